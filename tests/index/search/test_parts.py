"""Parts that are searched where they lie give what the merged index gives."""

from pathlib import Path

import numpy as np
import pytest
from support.index import config, one_rank, vectors, write_store
from support.threads import on_threads

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index import open_index, run_index_add, run_index_build, run_index_merge
from distlm.index.search.fastscan import packed_bytes
from distlm.index.search.split import split_search
from distlm.runtime.ranks.comm import SingleComm

K = 256


@pytest.mark.parametrize(
    ("factory", "count"), [("IVF32,PQ8", 10000), ("PCA16,IVF32,SQ8", 1000), ("IVF32,PQ16x4", 10000)]
)
def test_queries_find_the_same_in_the_parts_as_in_the_merged_index(factory: str, count: int, tmp_path: Path) -> None:
    keys = vectors(9000)
    write_store(tmp_path / "datastore", keys, rows_per_shard=2000)
    datastore = Datastore.open(tmp_path / "datastore")
    queries = vectors(count, seed=5)
    with one_rank(config(tmp_path, factory=factory, merge="false")) as stage:
        built = run_index_build(stage)
    index = open_index(tmp_path / "index", datastore)
    assert not (tmp_path / "index" / "merged.index").exists() and built["rows"] == index.rows == 9000
    ids, distances = index.search(queries, K, 8)
    with one_rank(config(tmp_path, factory=factory)) as stage:
        run_index_merge(stage)
    merged = open_index(tmp_path / "index", datastore)
    assert (tmp_path / "index" / "merged.index").exists() and merged.fingerprint == index.fingerprint
    expected, expected_distances = merged.search(queries, K, 8)
    assert np.array_equal(distances, expected_distances) and np.array_equal(ids, expected)
    if merged.fast_scan:
        return
    listed, listed_distances = open_index(tmp_path / "index", datastore, scan="lists").search(queries, K, 8)
    assert np.array_equal(listed_distances, expected_distances)
    # Of those as far as the last any may have been kept.
    nearer = expected_distances < expected_distances[:, -1:]
    one, other = (np.sort(np.where(nearer, found, -2)) for found in (listed, expected))
    assert np.array_equal(one, other)


def test_list_by_list_over_the_parts_and_4_bit_codes(tmp_path: Path) -> None:
    write_store(tmp_path / "datastore", vectors(5000))
    datastore = Datastore.open(tmp_path / "datastore")
    with one_rank(config(tmp_path, factory="IVF32,PQ16x4", merge="false")) as stage:
        run_index_build(stage)
    queries = vectors(9000, seed=6)
    index = open_index(tmp_path / "index", datastore, scan="lists")
    ids, distances = index.search(queries, 50, 4)
    assert not index.fast_scan and index.nprobe == 4
    one = [index.search(queries[start : start + 7], 50, 4)[1] for start in (0, 8190, 8993)]
    assert np.array_equal(np.concatenate(one), distances[[*range(7), *range(8190, 8197), *range(8993, 9000)]])
    # Tables of 8 bits find almost the same.
    packed = open_index(tmp_path / "index", datastore).search(queries, 50, 4)[0]
    assert np.mean([len(np.intersect1d(a, b)) for a, b in zip(ids[:200], packed[:200], strict=True)]) > 40


def test_what_helps_on_several_ranks_without_a_part_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "datastore", vectors(3000), rows_per_shard=1000)
    datastore, folder = Datastore.open(tmp_path / "datastore"), tmp_path / "index"
    queries = vectors(20, seed=5)

    def build(**index: object) -> None:
        with one_rank(config(tmp_path, factory="IVF8,SQ8", **index)) as stage:
            run_index_build(stage)

    def found(of: np.ndarray = queries) -> np.ndarray:
        # One rank alone, as a rank of several does it.
        pair = split_search(SingleComm(), folder, datastore, of, 16, 4)
        assert pair is not None
        return pair[0]

    build(merge="false")
    expected = found()
    (folder / "parts" / "part-00001.json").unlink()
    with pytest.raises(DistlmError, match=r"1 of 3 parts are missing \(shards 1\); run `distlm index add` again"):
        found()
    with one_rank(config(tmp_path, factory="IVF8,SQ8", merge="false")) as stage:
        assert run_index_add(stage)["parts"] == 1
        run_index_build(stage)
        assert run_index_add(stage)["done_before"]
    assert f"index add: {folder / 'parts'} is complete" in capsys.readouterr().err
    assert np.array_equal(found(), expected)
    # Merged, nothing adds parts until index.json is removed.
    build(keep_parts=False)
    with pytest.raises(
        DistlmError, match=r"3 of 3 parts are missing.*; remove .*index.json and .*build.* with index.keep_parts=true"
    ):
        found()
    assert np.array_equal(open_index(folder, datastore).search(queries, 16, 4)[0], expected)
    before = open_index(folder, datastore).fingerprint
    (folder / "index.json").unlink()
    build()
    # Neighbours of the index that was there stay valid.
    assert np.array_equal(found(), expected) and open_index(folder, datastore).fingerprint == before


def test_no_queries_have_no_neighbours_and_a_width(tmp_path: Path) -> None:
    write_store(tmp_path / "datastore", vectors(2000), rows_per_shard=1000)
    datastore = Datastore.open(tmp_path / "datastore")
    with one_rank(config(tmp_path, factory="IVF8,SQ8")) as stage:
        run_index_build(stage)
    for scan in ("queries", "lists"):
        pair = split_search(SingleComm(), tmp_path / "index", datastore, np.empty((0, 32), np.float16), 16, 4, scan)
        assert pair is not None and pair[0].shape == pair[1].shape == (0, 16)
        assert pair[0].dtype == np.int64 and pair[1].dtype == np.float32
    with pytest.raises(DistlmError, match=r"queries of shape \(0, 33\): expected \[Q, 32\]"):
        split_search(SingleComm(), tmp_path / "index", datastore, np.empty((0, 33), np.float16), 16, 4)


def test_4_bit_codes_are_compared_alike_on_any_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastScan or not is decided by the keys of the whole index, not by a rank's share of them."""
    datastore = write_store(tmp_path / "datastore", vectors(7500))
    with one_rank(config(tmp_path, factory="IVF32,PQ16x4", merge="false")) as stage:
        run_index_build(stage)
    queries = vectors(200, seed=6).astype(np.float32)
    found = {}
    for most in (packed_bytes(rows, 32, 8) for rows in (7499, 7500, 3500)):
        monkeypatch.setattr("distlm.index.search.fastscan.MOST_BYTES", most)
        index = open_index(tmp_path / "index", datastore)
        assert index.rounded == index.fast_scan == (most == packed_bytes(7500, 32, 8))
        found[most] = index.search(queries, 50, 8)[1]
        for ranks in (2, 3):
            whole, *others = on_threads(
                ranks, lambda comm: split_search(comm, tmp_path / "index", datastore, queries, 50, 8)
            )
            assert whole is not None and others == [None] * (ranks - 1)
            assert np.array_equal(whole[1], found[most])
    plain, fast, again = found.values()
    assert np.array_equal(plain, again) and not np.array_equal(plain, fast)


def test_a_missing_or_cut_part_is_named(tmp_path: Path) -> None:
    write_store(tmp_path / "datastore", vectors(3000))
    with one_rank(config(tmp_path, factory="IVF8,SQ8", merge="false")) as stage:
        run_index_build(stage)
        assert run_index_build(stage)["rows"] == 3000
    part = tmp_path / "index" / "parts" / "part-00001.index"
    with part.open("r+b") as stream:
        stream.truncate(part.stat().st_size - 1)
    with pytest.raises(DistlmError, match="one is missing or damaged"):
        open_index(tmp_path / "index", Datastore.open(tmp_path / "datastore"))
