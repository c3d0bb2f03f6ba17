"""Exact distances by the sorted pass: against fp64, and independent of how the work is cut."""

from typing import Any

import numpy as np
import pytest
import torch

from distlm.index import pairs
from distlm.index.pairs import sort_pairs
from distlm.knnlm.search import rescore
from distlm.knnlm.search.rescore import GroupScorer, nearest_first, plan_groups, unit_distances

WIDTH, ROWS, K = 24, 300, 7
SHARDS = [(0, 120), (120, 100), (220, 80)]


SHARED: dict[str, Any] = {"normalised": 3.0, "outliers": np.where(np.arange(WIDTH) % 11, 3.0, 3000.0)}
"""What all keys and queries have in common: streams that are not normalised have a few large values."""


@pytest.fixture(params=[("float16", "normalised"), ("float32", "normalised"), ("float16", "outliers")])
def shards(request, tmp_path):
    random = np.random.default_rng(0)
    dtype, kind = request.param
    keys = (random.normal(size=(ROWS, WIDTH)) + SHARED[kind]).astype(dtype)
    for number, (first, rows) in enumerate(SHARDS):
        np.save(tmp_path / f"keys-{number}.npy", keys[first : first + rows])
    return keys, [np.load(tmp_path / f"keys-{number}.npy", mmap_mode="r") for number in range(len(SHARDS))]


def units(keys, counts=(11, 4, 20), seed=1):
    random = np.random.default_rng(seed)
    queries, ids = [], []
    for count in counts:
        queries.append((random.normal(size=(count, WIDTH)) + keys.mean(axis=0, dtype=np.float64)).astype(keys.dtype))
        chosen = np.array([random.choice(ROWS, K, replace=False) for _ in range(count)])
        chosen[random.random(chosen.shape) < 0.1] = -1
        ids.append(chosen)
    return queries, ids


def score(memmaps, queries, ids):
    pairs = [sort_pairs(unit) for unit in ids]
    scorer = GroupScorer(np.concatenate(queries), pairs, [len(unit) for unit in queries])
    pieces = [scorer.shard(keys, first) for keys, (first, _) in zip(memmaps, SHARDS, strict=True)]
    offsets = [[np.diff(p.bounds([first, first + rows]))[0] for p in pairs] for first, rows in SHARDS]
    result = []
    for unit, p in enumerate(pairs):
        cut = [piece[sum(o[:unit]) : sum(o[: unit + 1])] for piece, o in zip(pieces, offsets, strict=True)]
        result.append(unit_distances(p, len(queries[unit]), cut))
    return result


def direct(keys, queries, ids):
    difference = queries.astype(np.float64)[:, None] - keys.astype(np.float64)[ids]
    return np.where(ids < 0, np.inf, (difference**2).sum(-1))


def test_distances_are_those_of_fp64(shards):
    keys, memmaps = shards
    queries, ids = units(keys)
    for q, i, found in zip(queries, ids, score(memmaps, queries, ids), strict=True):
        np.testing.assert_allclose(found, direct(keys, q, i), rtol=1e-6, atol=1e-4)
        assert np.isinf(found[i < 0]).all()


@pytest.mark.parametrize("large", [300.0, 1000.0, 3000.0])
def test_large_values_in_some_places_cost_no_digits(tmp_path, large):
    """In all keys alike, or varying by themselves: width 512, as in a stream that is not normalised."""
    random = np.random.default_rng(2)
    width, count = 512, 64
    centre = np.where(np.arange(width) % 256 == 7, large, 0.0)
    keys = (random.normal(size=(ROWS, width)) * 0.3 + centre).astype(np.float16)
    keys[::2, 7] *= np.float16(1.05)
    np.save(tmp_path / "keys.npy", keys)
    queries = keys[:count] + (random.normal(size=(count, width)) * 0.3).astype(np.float16)
    ids = np.tile(np.arange(ROWS), (count, 1))
    pairs = sort_pairs(ids)
    scorer = GroupScorer(queries, [pairs], [count])
    found = unit_distances(pairs, count, [scorer.shard(np.load(tmp_path / "keys.npy", mmap_mode="r"), 0)])
    true = direct(keys, queries, ids)
    np.testing.assert_allclose(found, true, rtol=3e-4)
    near = true < 2.0**-9 * (2 * large**2 + width)
    assert near.any()
    np.testing.assert_allclose(found[near], true[near], rtol=2e-6)


def test_places_of_more_pairs_than_32_bits_number_are_wide(shards, monkeypatch):
    assert [pairs.places_dtype(size) for size in (10, 2**31, 2**31 + 1)] == [torch.int32, torch.int32, torch.int64]
    keys, memmaps = shards
    queries, ids = units(keys)
    narrow = score(memmaps, queries, ids)
    monkeypatch.setattr(pairs, "places_dtype", lambda size: torch.int64)
    assert sort_pairs(ids[0]).places.dtype == np.int64
    assert all(map(np.array_equal, score(memmaps, queries, ids), narrow))


def test_a_stored_key_is_at_distance_zero_from_itself(shards):
    keys, memmaps = shards
    ids = np.arange(ROWS).reshape(-1, 1)
    found = score(memmaps, [keys], [ids])[0]
    assert (found == 0).all()


def test_how_the_work_is_cut_changes_no_bit(shards, monkeypatch):
    keys, memmaps = shards
    queries, ids = units(keys)
    together = score(memmaps, queries, ids)
    alone = [score(memmaps, [q], [i])[0] for q, i in zip(queries, ids, strict=True)]
    monkeypatch.setattr(rescore, "CHUNK_BYTES", 4 * WIDTH * 9)
    small_chunks = score(memmaps, queries, ids)
    for one, two, three in zip(together, alone, small_chunks, strict=True):
        assert one.tobytes() == two.tobytes() == three.tobytes()


def test_rows_above_32_bits_are_sorted_too():
    ids = np.array([[2**33, 5, -1], [7, 2**31, 5]])
    pairs = sort_pairs(ids)
    assert pairs.rows.tolist() == [5, 5, 7, 2**31, 2**33]
    assert pairs.places.tolist() == [1, 5, 3, 4, 0]


def test_shard_without_pairs_is_not_read(shards, tmp_path):
    keys, memmaps = shards
    pairs = [sort_pairs(np.full((3, 2), -1, np.int64))]
    scorer = GroupScorer(keys[:3], pairs, [3])
    assert len(scorer.shard(memmaps[0], 0)) == 0


def test_neighbours_are_ordered_by_distance_then_id_and_absent_ones_last():
    ids = np.array([[9, 4, -1, 2, 7]])
    distances = np.array([[1.0, 3.0, 0.0, 1.0, 0.5]], np.float32)
    values = np.array([[90, 40, -1, 20, 70]], np.int32)
    ids, distances, values = nearest_first(ids, distances, values)
    assert ids.tolist() == [[7, 2, 9, 4, -1]]
    assert distances.tolist() == [[0.5, 1.0, 1.0, 3.0, np.inf]]
    assert values.tolist() == [[70, 20, 90, 40, -1]]


def test_negative_zero_is_zero_and_large_ids_sort_the_same_way():
    distances = np.array([[0.5, -0.0, 0.0, -1e-6, 2.0]], np.float32)
    small = np.array([[4, 3, 2, 1, 0]])
    for ids in (small, small + 2**33):
        order, near, _ = nearest_first(ids, distances, ids.astype(np.int32))
        assert (order - ids.min()).tolist() == [[1, 2, 3, 4, 0]]
        assert near.tolist() == [[0.0, 0.0, 0.0, 0.5, 2.0]]


def test_groups_hold_consecutive_units_within_the_budget():
    size = 10 * (4 * 8 + 8 * 4)
    assert plan_groups([10, 10, 10, 10, 10], 4, 8, budget=2 * size) == [[0, 1], [2, 3], [4]]
    assert plan_groups([10, 10], 4, 8, budget=1) == [[0], [1]]
    assert plan_groups([], 4, 8) == []
