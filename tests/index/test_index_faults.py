"""Damaged, foreign, missing and superfluous files are refused with the file's name and the mend."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.disk import small_disk
from support.index import config, one_rank, vectors, write_store
from support.records import alter

from distlm.errors import DistlmError
from distlm.index import run_index_add, run_index_build, run_index_merge, run_index_train
from distlm.runtime.files import bytes_below, file_hash

FACTORY = "IVF16,SQ8"


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose parts are added and not merged."""
    folder = tmp_path_factory.mktemp("added")
    _add(folder, vectors(3000))
    return folder


def _add(folder: Path, keys: np.ndarray, model: str = "m" * 32, **index: object) -> None:
    write_store(folder / "datastore", keys, rows_per_shard=1000, model=model)
    with one_rank(config(folder, factory=FACTORY, **index)) as stage:
        run_index_train(stage)
        run_index_add(stage)


@pytest.fixture
def run_dir(added: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(added, tmp_path / "run"))


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _edit(path: Path, **fields: object) -> None:
    alter(path, **fields)


def _reseal(part: Path) -> None:
    _edit(part.with_suffix(".json"), xxh3=file_hash(part), bytes=part.stat().st_size)


def _other_state(parts: Path) -> None:
    # One byte of the trained ranges, resealed: faiss's own merge would take it.
    _flip(parts / "part-00001.index", 2400)
    _reseal(parts / "part-00001.index")


def _duplicate(parts: Path) -> None:
    shutil.copy(parts / "part-00000.index", parts / "part-00001.index")
    shutil.copy(parts / "part-00000.json", parts / "part-00001.json")


def _cut(parts: Path) -> None:
    path = parts / "part-00001.index"
    path.write_bytes(path.read_bytes()[:-100])


def _cut_and_reseal(parts: Path) -> None:
    _cut(parts)
    _reseal(parts / "part-00001.index")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_cut, "part-00001.index is truncated or changed"),
    "truncated, resealed": (_cut_and_reseal, "part-00001.index: its lists hold 1000 keys"),
    "flipped byte": (lambda parts: _flip(parts / "part-00001.index", -5000), "part-00001.index: damaged"),
    "other trained state": (_other_state, "its trained state differs"),
    "missing part": (lambda parts: (parts / "part-00001.index").unlink(), "part-00001.index is missing"),
    "missing sidecar": (lambda parts: (parts / "part-00001.json").unlink(), r"1 of 3 parts are missing \(shards 1\)"),
    "listed twice": (_duplicate, "part-00001.json: shard is 0, expected 1"),
    "other template": (
        lambda parts: _edit(parts / "part-00002.json", template="x"),
        "part of another template.*names x",
    ),
    "other store": (lambda parts: _edit(parts / "part-00002.json", datastore="y"), "part of another store.*names y"),
    "other ids": (lambda parts: _edit(parts / "part-00002.json", first_id=7), "first_id is 7, expected 2000"),
    "too many": (
        lambda parts: shutil.copy(parts / "part-00002.json", parts / "part-00003.json"),
        "part-00003.json: part of a shard that this store of 3 shards does not have",
    ),
    "cut sidecar": (lambda parts: (parts / "part-00000.json").write_text("{"), "part-00000.json: not valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_merge_refuses(run_dir: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    damage(run_dir / "index" / "parts")
    with one_rank(config(run_dir, factory=FACTORY)) as stage, pytest.raises(DistlmError, match=words):
        run_index_merge(stage)
    assert not (run_dir / "index" / "merged.index").exists()
    assert not (run_dir / "index" / "index.json").exists()


@pytest.mark.parametrize("name", ["truncated", "missing part", "missing sidecar", "other template", "cut sidecar"])
def test_add_mends_what_merge_refuses(run_dir: Path, added: Path, name: str) -> None:
    DAMAGE[name][0](run_dir / "index" / "parts")
    with one_rank(config(run_dir, factory=FACTORY)) as stage:
        assert run_index_add(stage)["parts"] == 1
        run_index_merge(stage)
    for path in (added / "index" / "parts").iterdir():
        assert (run_dir / "index" / "parts" / path.name).read_bytes() == path.read_bytes()


def test_part_of_another_template_in_place_of_ours(run_dir: Path, tmp_path: Path) -> None:
    _add(tmp_path / "other", vectors(3000), seed=2)
    for suffix in ("index", "json"):
        shutil.copy(tmp_path / f"other/index/parts/part-00001.{suffix}", run_dir / "index" / "parts")
    with one_rank(config(run_dir, factory=FACTORY)) as stage, pytest.raises(DistlmError, match="another template"):
        run_index_merge(stage)


def test_files_of_another_store_are_refused_by_every_stage(run_dir: Path) -> None:
    with one_rank(config(run_dir, factory=FACTORY)) as stage:
        run_index_merge(stage)
    write_store(run_dir / "datastore", vectors(3000, seed=8), rows_per_shard=1000)
    with one_rank(config(run_dir, factory=FACTORY)) as stage:
        for function in (run_index_train, run_index_add, run_index_merge, run_index_build):
            with pytest.raises(DistlmError, match="template of another store"):
                function(stage)


def test_damaged_template(run_dir: Path) -> None:
    _flip(run_dir / "index" / "template.index", 500)
    with (
        one_rank(config(run_dir, factory=FACTORY)) as stage,
        pytest.raises(DistlmError, match=r"template\.index: damaged"),
    ):
        run_index_add(stage)


def test_other_settings_and_missing_stages(run_dir: Path, tmp_path: Path) -> None:
    other = config(run_dir, factory="IVF8,SQ8")
    with one_rank(other) as stage, pytest.raises(DistlmError, match="trained with factory 'IVF16,SQ8', now 'IVF8,SQ8'"):
        run_index_train(stage)
    write_store(tmp_path / "new" / "datastore", vectors(100))
    with one_rank(config(tmp_path / "new", factory=FACTORY)) as stage:
        with pytest.raises(DistlmError, match="run `distlm index train` first"):
            run_index_add(stage)
        with pytest.raises(DistlmError, match="run `distlm index train` first"):
            run_index_merge(stage)


def test_an_index_of_other_keys_fails_its_self_check(run_dir: Path) -> None:
    """Same shapes, same fingerprints, other bytes of keys: what a copied or edited store would look like."""
    np.save(run_dir / "datastore" / "keys-00001.npy", vectors(1000, seed=5))
    np.save(run_dir / "datastore" / "keys-00002.npy", vectors(1000, seed=6))
    with (
        one_rank(config(run_dir, factory=FACTORY)) as stage,
        pytest.raises(DistlmError, match="sampled rows are not in"),
    ):
        run_index_merge(stage)
    assert not (run_dir / "index" / "merged.index").exists()
    assert not (run_dir / "index" / "index.json").exists()


def test_parts_that_nothing_vouches_for_need_no_room_beside_the_new_ones(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = run_dir / "index" / "parts"
    before = {path.name: file_hash(path) for path in parts.glob("part-*.index")}
    # The codes of a part are on the disk while it is put together.
    room = 2 * bytes_below(parts) + 10_000
    for sidecar in parts.glob("part-*.json"):
        sidecar.unlink()
    small_disk(monkeypatch, parts, room)
    with one_rank(config(run_dir, factory=FACTORY)) as stage:
        run_index_add(stage)
    assert {path.name: file_hash(path) for path in parts.glob("part-*.index")} == before


def test_full_disk_is_said_before_work(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(run_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with one_rank(config(run_dir, factory=FACTORY)) as stage:
        with pytest.raises(DistlmError, match=r"the merged index needs .* and the disk has 1\.0 kB free"):
            run_index_merge(stage)
        shutil.rmtree(run_dir / "index" / "parts")
        with pytest.raises(DistlmError, match="3 index parts needs"):
            run_index_add(stage)
