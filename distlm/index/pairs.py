"""Neighbours in the order of the store's rows, so that whatever is read of those rows is read once, in order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from distlm.datastore.reader import Datastore


@dataclass(frozen=True)
class SortedPairs:
    """The pairs of one unit in the order of their rows."""

    rows: npt.NDArray[np.int64 | np.int32]
    """Store row of each pair, ascending: [P]. Pairs without a neighbour (−1) are left out."""
    places: npt.NDArray[np.int64 | np.int32]
    """Where each pair stands in the unit's flattened [q, k] arrays: [P], of places_dtype."""
    k: int

    def bounds(self, edges: Sequence[int]) -> npt.NDArray[np.int64]:
        """First pair at or after each row of `edges`: int64 [len(edges)]."""
        # In the rows' own dtype: another one would convert all of them at every call.
        limits = np.minimum(edges, np.iinfo(self.rows.dtype).max).astype(self.rows.dtype)
        return np.searchsorted(self.rows, limits).astype(np.int64)


def places_dtype(size: int) -> torch.dtype:
    """int32, or int64 where `size` places need it."""
    return torch.int32 if size <= 2**31 else torch.int64


def sort_pairs(ids: npt.NDArray[np.int64]) -> SortedPairs:
    """Sort a unit's neighbours [q, k] by row."""
    flat = torch.from_numpy(np.array(ids).reshape(-1))
    if len(flat) and int(flat.max()) < 2**31 - 1:
        # A radix sort of 32-bit numbers takes half the time and memory of one of 64 bits.
        flat = flat.to(torch.int32)
    rows, places = torch.sort(flat, stable=True)
    absent = int(torch.searchsorted(rows, 0))
    return SortedPairs(rows[absent:].numpy(), places[absent:].to(places_dtype(ids.size)).numpy(), ids.shape[1])


def stored_values(datastore: Datastore, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The stored target of each row `ids` [q, k]: int32 of the same shape; −1 where the id is −1."""
    values = np.full(ids.size, -1, np.int32)
    pairs: SortedPairs = sort_pairs(ids)
    for shard in datastore.shards:
        low, high = pairs.bounds([shard.first_row, shard.first_row + shard.rows])
        if high > low:
            stored = datastore.values(shard.index)
            values[pairs.places[low:high]] = stored[pairs.rows[low:high] - shard.first_row]
    return values.reshape(ids.shape)
