"""The merged file is, byte for byte, what one process writes with stock faiss."""

import ctypes
import errno
import filecmp
import resource
from pathlib import Path

import numpy as np
import pytest
from support.index import config, one_process_build, one_rank, vectors, write_store

import distlm.index.merge.copy
import distlm.index.merge.stage
from distlm.errors import DistlmError
from distlm.index import index_info, run_index_build, run_index_merge
from distlm.index.build.stage import PartFiles
from distlm.index.merge.copy import preallocate
from distlm.index.train.template import train_template
from distlm.runtime.files import file_hash

FACTORIES = [
    "IVF64,PQ8",
    "IVF64,SQ8",
    "IVF64,Flat",
    "PCA16,IVF64,PQ8x4",
    "OPQ4,IVF64,PQ4",
    "IVF64_HNSW8,RaBitQ",
    "IVF1,Flat",
    "PCA16,IVF64_HNSW8,SQ4",
    "IVF64,SQ6",
]


@pytest.mark.parametrize("factory", FACTORIES)
def test_merged_is_identical_to_one_process(tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distlm.index.merge.stage, "UNIT_BYTES", 20_000)
    # Enough keys for 64 lists and no more: OPQ trains for seconds.
    keys = vectors(3000)
    write_store(tmp_path / "datastore", keys, rows_per_shard=800)
    with one_rank(config(tmp_path, factory=factory)) as stage:
        result = run_index_build(stage)
    one_process_build(tmp_path / "index" / "template.index", keys, tmp_path / "one.index")
    assert filecmp.cmp(tmp_path / "one.index", tmp_path / "index" / "merged.index", shallow=False)
    assert result["rows"] == 3000
    assert result["self_found"] > 0.9
    record = index_info(tmp_path / "index").index
    assert record is not None and record.bytes == (tmp_path / "one.index").stat().st_size
    assert record.xxh3 == file_hash(tmp_path / "one.index", record.xxh3) and record.xxh3.startswith("20000_")


def test_sparse_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the lists or fewer hold keys: faiss then writes another header. Outer lists are empty too."""
    monkeypatch.setattr(distlm.index.merge.stage, "UNIT_BYTES", 3000)
    # Trained on all, but the store that is added holds three clusters only.
    every = vectors(6000, clusters=64)
    few = np.concatenate([every[:1] + np.float16(0.01) * vectors(700, seed=row) for row in range(3)])
    write_store(tmp_path / "datastore", few, rows_per_shard=300)
    monkeypatch.setattr(
        "distlm.index.build.template.trained",
        lambda plan, _sample, seed, *_: train_template(plan, every.astype(np.float32), seed, 1),
    )
    with one_rank(config(tmp_path, factory="IVF50,SQ8")) as stage:
        run_index_build(stage)
    merged = (tmp_path / "index" / "merged.index").read_bytes()
    assert b"sprs" in merged and b"full" not in merged
    one_process_build(tmp_path / "index" / "template.index", few, tmp_path / "one.index")
    assert merged == (tmp_path / "one.index").read_bytes()


def test_a_list_larger_than_a_unit_is_copied_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distlm.index.merge.stage, "UNIT_BYTES", 500)
    monkeypatch.setattr(distlm.index.merge.copy, "PIECE", 333)
    keys = vectors(2000)
    write_store(tmp_path / "datastore", keys, rows_per_shard=700)
    with one_rank(config(tmp_path, factory="IVF4,SQ8")) as stage:
        run_index_build(stage)
    one_process_build(tmp_path / "index" / "template.index", keys, tmp_path / "one.index")
    assert filecmp.cmp(tmp_path / "one.index", tmp_path / "index" / "merged.index", shallow=False)


def answers(monkeypatch: pytest.MonkeyPatch, *codes: int) -> list[int]:
    """Have the kernel refuse to reserve blocks with each of `codes`, one a call; those that are left."""
    left = list(codes)

    def refuse(*_arguments: int) -> int:
        if not left:
            return 0
        ctypes.set_errno(left.pop(0))
        return -1

    monkeypatch.setattr(distlm.index.merge.copy, "_fallocate", refuse)
    return left


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_blocks_cannot_be_reserved_none_is_written(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, code)
    preallocate(tmp_path / "file", 1 << 30)
    found = (tmp_path / "file").stat()
    assert found.st_size == 1 << 30
    assert found.st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_when_blocks_are_reserved(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A signal on the way is no error.
    left = answers(monkeypatch, errno.EINTR, code)
    with pytest.raises(DistlmError, match=r"/file: (no space left|disk quota exceeded).*; free some"):
        preallocate(tmp_path / "file", 1 << 20)
    assert not left


def test_blocks_are_reserved_and_sizes_have_64_bits(tmp_path: Path) -> None:
    preallocate(tmp_path / "file", 5 << 20)
    found = (tmp_path / "file").stat()
    assert found.st_size == 5 << 20
    assert found.st_blocks * 512 >= 5 << 20
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        # Of 32 bits it would be one byte.
        with pytest.raises(DistlmError, match="file too large"):
            preallocate(tmp_path / "file", (1 << 32) + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_finished_stages_return_at_once_and_parts_can_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = vectors(2000)
    write_store(tmp_path / "datastore", keys)
    with one_rank(config(tmp_path, factory="IVF8,SQ8")) as stage:
        run_index_build(stage)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.index")}
        assert len(before) == 4
        run_index_build(stage)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.index")} == before
    assert "index merge: " in (text := capsys.readouterr().err) and text.count("is complete, nothing to do") == 3
    with one_rank(config(tmp_path, factory="IVF8,SQ8", keep_parts=False)) as stage:
        assert run_index_merge(stage)["done_before"]
    assert not list((tmp_path / "index" / "parts").iterdir())
    assert index_info(tmp_path / "index").parts == PartFiles(0, 0)
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert all(f'"stage": "index {name}", "stage/seconds"' in metrics for name in ("train", "add", "merge"))
