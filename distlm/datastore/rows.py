"""Rows of a store by their global numbers, read where they lie."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from distlm.datastore.reader import Datastore

Array = npt.NDArray[Any]


class Rows(NamedTuple):
    """Some rows of a store; one row has neither the first dimension nor a list of values."""

    keys: Array
    """float16 or float32 [..., D], as stored."""
    values: Array
    """int32 [...]: token ids."""


def read_rows(store: Datastore, chosen: int | slice | npt.ArrayLike) -> Rows:
    """Rows by global number: an int, a slice, or an array of ints of any shape, whose shape the result begins with.

    A slice within one shard is a view of the memory-mapped files; of anything else the rows that are asked for are
    copied. Raises IndexError for numbers outside 0..N−1, below zero too: −1 is what a search gives where there is no
    neighbour, not the last row.
    """
    if isinstance(chosen, slice):
        return _slice(store, range(*chosen.indices(store.rows)))
    asked = np.asarray(chosen)
    if asked.dtype.kind not in "iu" and asked.size:
        raise IndexError(f"rows are ints, a slice, or an array of ints, not {asked.dtype}")
    if asked.size and not 0 <= (least := int(asked.min())) <= (most := int(asked.max())) < store.rows:
        wrong = least if least < 0 else most
        why = ": a search gives −1 where it found fewer than k" if wrong == -1 else ""
        raise IndexError(f"row {wrong}: the store has the rows 0 to {store.rows - 1}{why}")
    flat = asked.astype(np.int64).reshape(-1)
    keys, values = gathered(store, flat, "keys", store.key_dtype), gathered(store, flat, "values", np.int32)
    if not asked.ndim:
        return Rows(keys[0], values[0])
    return Rows(keys.reshape(*asked.shape, store.width), values.reshape(asked.shape))


def gathered(store: Datastore, rows: Array, part: Literal["keys", "values"], dtype: npt.DTypeLike) -> Array:
    """Keys [n, D] or values [n] of `rows` int64 [n], in their order; each row is read once, in ascending order."""
    wanted, places = np.unique(rows, return_inverse=True)
    firsts = np.array([shard.first_row for shard in store.shards] + [store.rows])
    edges = np.searchsorted(wanted, firsts)
    found = np.empty((len(wanted), store.width) if part == "keys" else len(wanted), dtype)
    for number, (start, stop) in enumerate(pairwise(edges.tolist())):
        if start < stop:
            shard = store.keys(number) if part == "keys" else store.values(number)
            found[start:stop] = shard[wanted[start:stop] - firsts[number]]
    return found[places.reshape(-1)]


def _slice(store: Datastore, rows: range) -> Rows:
    if not len(rows) or rows.step < 1:
        return read_rows(store, np.array(rows, np.int64))
    pieces = []
    for shard in store.shards:
        # The first row of the slice that is not before this shard.
        start = rows.start + max(0, -(-(shard.first_row - rows.start) // rows.step)) * rows.step
        stop = min(rows.stop, shard.first_row + shard.rows)
        if start < stop:
            inside = slice(start - shard.first_row, stop - shard.first_row, rows.step)
            pieces.append((store.keys(shard.index)[inside], store.values(shard.index)[inside]))
    if len(pieces) == 1:
        return Rows(*pieces[0])
    keys, values = zip(*pieces, strict=True)
    return Rows(np.concatenate(keys), np.concatenate(values))
