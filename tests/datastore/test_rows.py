"""Rows of a store by number are those of its shards."""

import numpy as np
import pytest
from support import shared

from distlm.datastore.reader import Datastore
from distlm.runtime.rundir import RunDir


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    found = Datastore.open(RunDir.of(shared.stored(tmp_path_factory)).datastore)
    assert len(found.shards) > 2
    return found


@pytest.fixture(scope="module")
def whole(store: Datastore) -> tuple[np.ndarray, np.ndarray]:
    """All keys and values, by the files themselves."""
    parts = [(np.load(store.folder / f"keys-{i:05d}.npy"), np.load(store.folder / f"values-{i:05d}.npy"))
             for i in range(len(store.shards))]  # fmt: skip
    return np.concatenate([keys for keys, _ in parts]), np.concatenate([values for _, values in parts])


def test_one_row(store, whole):
    edge = store.shards[1].first_row
    for row in (0, edge - 1, edge, np.int64(edge + 1), len(store) - 1):
        keys, values = store[row]
        assert keys.shape == (store.width,) and keys.dtype == store.key_dtype and values.dtype == np.int32
        np.testing.assert_array_equal(keys, whole[0][row])
        assert values == whole[1][row]


@pytest.mark.parametrize("chosen", [
    slice(None), slice(10, 20), slice(500, 1100), slice(3, None, 7), slice(-5, None), slice(100, 10, -9), slice(5, 5),
    slice(0, 10**9), slice(511, 1500, 512), slice(600, 700, 3),
], ids=str)  # fmt: skip
def test_slices(store, whole, chosen):
    found = store[chosen]
    for mine, theirs in zip(found, whole, strict=True):
        np.testing.assert_array_equal(mine, theirs[chosen])
        assert mine.dtype == theirs.dtype


def test_a_slice_within_a_shard_is_a_view_of_the_file(store):
    first = store.shards[1].first_row
    assert all(isinstance(part, np.memmap) for part in store[first : first + 9])


def test_arrays_of_any_shape(store, whole):
    random = np.random.default_rng(0)
    for rows in (random.integers(0, len(store), 50), random.integers(0, len(store), (4, 3)), np.array([], int), [3, 3]):
        keys, values = store[rows]
        assert values.shape == np.shape(rows) and keys.shape == (*np.shape(rows), store.width)
        np.testing.assert_array_equal(keys, whole[0][rows])
        np.testing.assert_array_equal(values, whole[1][rows])


@pytest.mark.parametrize("wrong", [-1, [3, -1], [0, 10**7], 10**7, [0.5], np.array([True, False])], ids=str)
def test_what_is_no_row_is_refused(store, wrong):
    with pytest.raises(IndexError, match="row"):
        store[wrong]
