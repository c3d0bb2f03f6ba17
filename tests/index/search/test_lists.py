"""A search list by list: what is kept does not depend on who looked at which list, or when."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.index import config, one_rank, vectors, write_store

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index import open_index, run_index_build
from distlm.index.search import lists
from distlm.index.search.lists import Nearest
from distlm.knnlm.search.by_lists import batches, shares


def test_the_least_pairs_of_distance_and_id_are_kept_in_any_order() -> None:
    random = np.random.default_rng(0)
    for k in (1, 3, 20):
        # Few values, so that most are equal; below zero are roundings of encoded distances.
        distances = random.integers(-2, 6, (5, 60)).astype(np.float32) / 3
        distances[0, :4] = [-0.0, 0.0, np.inf, 1e-40]
        ids = np.stack([random.permutation(2**32 - 1 - np.arange(60)) for _ in range(5)])
        ids[:, 50:] = -1
        seen = np.where(ids < 0, np.inf, distances)
        order = np.lexsort((np.where(ids < 0, 2**40, ids), seen), axis=1)[:, :k]
        want = np.take_along_axis(ids, order, 1), np.take_along_axis(seen, order, 1)
        ranks = []
        for turn in (random.permutation(60), np.arange(60)):
            whole = [Nearest(5, k) for _ in range(3)]
            for start in range(0, 60, 7):
                place = turn[start : start + 7]
                by_distance = place[np.argsort(distances[0][place])]
                rows = random.permutation(5)[:5]
                one = whole[start % 3]
                one.add(rows, distances[rows][:, by_distance], ids[rows][:, by_distance])
            ranks.append(Nearest.of_shares([one.packed for one in whole]).found())
        for found in ranks:
            assert np.array_equal(found[0], want[0])
            assert np.array_equal(found[1], np.where(want[0] < 0, np.float32(np.inf), want[1]))


@pytest.mark.parametrize("factory", ["IVF32,PQ4", "PCA16,IVF32,SQ8", "IVF32,PQ16x4", "IVF32,Flat"])
def test_shares_of_the_lists_give_what_all_lists_give(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = vectors(4000)
    # Copies: keys of one distance, of which some are the k-th.
    write_store(tmp_path / "datastore", np.concatenate([keys, keys[:2000], keys[:1000]]), rows_per_shard=2000)
    with one_rank(config(tmp_path, factory=factory)) as stage:
        run_index_build(stage)
    index = open_index(tmp_path / "index", Datastore.open(tmp_path / "datastore"), scan="lists")
    queries = vectors(700, seed=5).astype(np.float32)
    ids, distances = index.search(queries, 40, 6)
    probed = index.probed(queries, 6)
    for ranks in (1, 2, 5, 32, 40):
        of = shares(probed.lists, index.list_sizes, ranks)
        assert len(of) == ranks and of[0][0] == 0 and of[-1][1] == 32 and all(a[1] == b[0] for a, b in pairwise(of))
        packed = [index.scan_lists(probed, 40, share).packed for share in of]
        found = Nearest.of_shares(packed).found()
        assert np.array_equal(found[0], ids) and np.array_equal(found[1], distances)
    monkeypatch.setattr(lists, "MOST_IDS", 6999)
    with pytest.raises(DistlmError, match=r"knn.scan=lists: 7000 keys, at most 6999; set knn.scan=queries"):
        index.search(queries, 40, 6)


def test_batches_are_of_units_that_fit_and_shares_of_equal_work() -> None:
    tokens = [5, 5, 5, 30, 1, 1, 1, 9]
    assert list(batches(range(8), tokens, 10)) == [[0, 1], [2], [3], [4, 5, 6], [7]]
    assert list(batches([0, 2, 4, 5], tokens, 10)) == [[0, 2], [4, 5]]
    assert list(batches([], tokens, 10)) == []
    sizes = np.array([100, 1, 1, 100, 1, 100, 100, 1])
    assert shares(np.array([[-1, 0], [3, 3]]), sizes, 2) == [(0, 3), (3, 8)]
    assert lists.batch_queries(1024, 1024, 32) == 20480 and lists.batch_queries(10, 10**9, 1) == 1024
