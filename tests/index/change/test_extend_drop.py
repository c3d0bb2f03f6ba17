"""A finished index grows by new keys and loses some: the others keep their ids, and the bytes are those of faiss."""

import json
import socket
from pathlib import Path

import faiss
import numpy as np
import pytest
from support.disk import small_disk
from support.index import vectors, without_polysemous

from distlm.cli import main
from distlm.errors import DistlmError, UsageError
from distlm.index.change.drop import drop_keys
from distlm.index.change.extend import extend_index
from distlm.index.merge.join import join_indexes
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.stop import StopFlag

KEYS = vectors(3000, seed=1)


def built(ids: np.ndarray, out: Path, factory: str) -> Path:
    """What one faiss process writes that adds the keys of these ids."""
    index = without_polysemous(faiss.index_factory(32, factory))
    faiss.omp_set_num_threads(1)
    index.train(vectors(2000).astype(np.float32))
    index.add_with_ids(KEYS[ids].astype(np.float32), ids)
    faiss.write_index(index, str(out))
    return out


def joined(parts: list[Path], out: Path, gaps: bool = False) -> Path:
    join_indexes(SingleComm(), StopFlag(), parts, out, "keep", gaps)
    return out


@pytest.mark.parametrize("factory", ["IVF32,PQ4", "PCA16,IVF32,SQ8", "IVF32_HNSW8,RaBitQ"])
def test_a_grown_and_shrunk_index_is_that_of_one_process(factory: str, tmp_path: Path) -> None:
    first = built(np.arange(1900), tmp_path / "first.index", factory)
    before = first.read_bytes()
    np.save(tmp_path / "a.npy", KEYS[1900:2500])
    np.save(tmp_path / "b.npy", KEYS[2500:].astype(np.float32))
    summary = extend_index(first, [tmp_path / "a.npy", tmp_path / "b.npy"], tmp_path / "new.index")
    assert summary == {"rows": 1100, "first_id": 1900} and first.read_bytes() == before
    whole = joined([tmp_path / "new.index", first], tmp_path / "whole.index")
    expected = built(np.arange(3000), tmp_path / "expected.index", factory)
    if "PCA" not in factory:
        assert whole.read_bytes() == expected.read_bytes()
    again = tmp_path / "again.index"
    assert drop_keys(whole, [], ["new.index"], again)["dropped"] == 1100
    assert again.read_bytes() == before
    kept = np.concatenate([np.arange(200), np.arange(950, 3000)])
    drop_keys(whole, [(200, 700), (600, 950)], [], tmp_path / "less.index")
    less = faiss.read_index(str(tmp_path / "less.index"))
    assert less.ntotal == len(kept)
    if "PCA" not in factory:
        assert (tmp_path / "less.index").read_bytes() == built(kept, expected, factory).read_bytes()
    faiss.extract_index_ivf(less).nprobe = 32
    found = less.search(KEYS[:400].astype(np.float32), 5)[1]
    assert np.isin(found, kept).all()


def test_a_killed_start_leaves_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built(np.arange(1900), tmp_path / "first.index", "IVF32,SQ8")
    np.save(tmp_path / "keys.npy", KEYS[1900:])
    out, size = tmp_path / "out", first.stat().st_size
    out.mkdir()
    # Of this machine, by a process that is gone.
    left = [f".new.index.{socket.gethostname()}.{2**22 + 1}.tmp", ".less.index.tmp"]
    for name in left:
        (out / name).write_bytes(bytes(size))
        small_disk(monkeypatch, out, size + size // 2)
        if name == left[0]:
            extend_index(first, [tmp_path / "keys.npy"], out / "new.index")
            (out / "new.index").unlink()
        else:
            drop_keys(first, [(0, 10)], [], out / "less.index")
    assert not list(out.glob(".*.tmp"))


def test_new_keys_under_ids_that_are_there_are_refused_by_the_merge(tmp_path: Path) -> None:
    first = built(np.arange(1000), tmp_path / "first.index", "IVF32,SQ8")
    np.save(tmp_path / "new.npy", KEYS[1000:1100])
    extend_index(first, [tmp_path / "new.npy"], tmp_path / "new.index", first_id=950)
    with pytest.raises(DistlmError, match=r"the id 9\d\d is in"):
        joined([first, tmp_path / "new.index"], tmp_path / "whole.index")
    extend_index(first, [tmp_path / "new.npy"], tmp_path / "later.index", first_id=2000)
    joined([first, tmp_path / "later.index"], tmp_path / "gaps.index", gaps=True)
    with pytest.raises(DistlmError, match=r"was not merged from later.index; its parts are none"):
        drop_keys(tmp_path / "gaps.index", [], ["later.index"], tmp_path / "less.index")


def test_parts_of_one_file_name_are_told_apart_by_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run1").mkdir()
    (tmp_path / "run2").mkdir()
    one = built(np.arange(100), tmp_path / "run1" / "merged.index", "IVF32,SQ8")
    two = built(np.arange(100, 400), tmp_path / "run2" / "merged.index", "IVF32,SQ8")
    index, out = joined([one, two], tmp_path / "all.index"), tmp_path / "less.index"
    with pytest.raises(UsageError, match=rf"2 files of that name; name one by its path: {one}, {two}"):
        drop_keys(index, [], ["merged.index"], out)
    with pytest.raises(DistlmError, match=rf"was not merged from other.index; its parts are {one}, {two}"):
        drop_keys(index, [], ["other.index"], out)
    monkeypatch.chdir(tmp_path / "run2")
    # As it was given to the merge, from another folder, whole, and from here.
    for name, rows in ((Path("run1", "merged.index"), 300), (one, 300), (Path("..", "run1", "merged.index"), 300),
                       (Path("merged.index"), 100)):  # fmt: skip
        assert drop_keys(index, [], [str(name)], out)["rows"] == rows
        out.unlink()


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    first = built(np.arange(1000), tmp_path / "first.index", "IVF32,SQ8")
    out = tmp_path / "out.index"
    np.save(tmp_path / "wide.npy", np.zeros((4, 33), np.float32))
    with pytest.raises(DistlmError, match=r"wide.npy: keys of width 33, .* has keys of width 32"):
        extend_index(first, [tmp_path / "wide.npy"], out)
    bad = KEYS[:4].copy()
    bad[2, 5] = np.inf
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(DistlmError, match=r"bad.npy: row 2 holds NaN or infinite"):
        extend_index(first, [tmp_path / "bad.npy"], out)
    with pytest.raises(DistlmError, match="has no ids from 5000 to 5009"):
        drop_keys(first, [(0, 10), (5000, 5010)], [], out)
    with pytest.raises(DistlmError, match="no key would stay"):
        drop_keys(first, [(0, 1000)], [], out)
    with pytest.raises(UsageError, match="say what"):
        drop_keys(first, [], [], out)
    with pytest.raises(DistlmError, match="is there already"):
        drop_keys(first, [(0, 10)], [], first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.npy", "first.index", "wide.npy"]


def test_both_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = built(np.arange(1000), tmp_path / "first.index", "IVF32,SQ8")
    np.save(tmp_path / "new.npy", KEYS[1000:])
    words = ["index", "extend", "--index", str(first), "--keys", str(tmp_path / "new.npy")]
    with pytest.raises(SystemExit) as done:
        main([*words, "--out", str(tmp_path / "new.index")])
    assert done.value.code == 0 and "rows=2000 first_id=1000" in capsys.readouterr().out
    assert json.loads((tmp_path / "new.index.json").read_text())["first_id"] == 1000
    with pytest.raises(SystemExit) as done:
        main(["index", "drop", "--index", str(first), "--ids", "10:5", "--out", str(tmp_path / "less.index")])
    assert done.value.code == 2 and "--ids 10:5: write LOW:HIGH" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["index", "drop", "--index", str(first), "--ids", "0:5", "--out", str(tmp_path / "less.index")])
    assert done.value.code == 0 and "rows=995 dropped=5" in capsys.readouterr().out
