"""A search list by list: each inverted list is read once for all queries of a batch that probe it.

Query by query, every query reads all its lists; from memory that is as fast, but an index that is larger than memory
would be read from the disk again and again. (The order of faiss's contrib.big_batch_search.) Lists may be shared out
over ranks, each of which then reads its own ones only: what is kept of each query is the k least pairs of (distance,
id), so that it does not matter who looked at which list, or in which order.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np

from distlm.errors import DistlmError
from distlm.index.layout import Array

BATCH_BYTES = 256 << 20
"""Queries that share a reading of the lists, their neighbours and probed lists. A rank holds this about three times."""
SCAN_QUERIES = 512
"""Queries of one scan of a list on one thread: 20 bytes × k of each are in use besides."""
MOST_IDS = 1 << 32
_NONE = np.uint64(2**64 - 1)
_SIGN = np.uint32(1 << 31)


def batch_queries(width: int, k: int, nprobe: int) -> int:
    """Queries of a batch: of `width` values, k neighbours and nprobe lists each."""
    return max(1024, BATCH_BYTES // (4 * width + 8 * k + 12 * nprobe) // 1024 * 1024)


class Nearest:
    """The k nearest keys of each query so far, by (distance, id). Keys of one distance and two ids are two."""

    def __init__(self, queries: int, k: int) -> None:
        self.packed = np.full((queries, k), _NONE, np.uint64)
        """[n, k]: the distance's bits, which rise with it, above the id's; not in order."""
        self._last = np.full(queries, _NONE, np.uint64)

    def add(self, rows: Array, distances: Array, ids: Array) -> None:
        """Take keys at squared L2 fp32 [m, c], ascending in each row, with ids int64 [m, c] (−1: none) for the queries
        `rows` int64 [m], each once."""
        self.join(rows, _packed(distances, ids))

    def join(self, rows: Array, packed: Array) -> None:
        """The same for keys as they are kept here, uint64 [m, c]."""
        k = self.packed.shape[1]
        nearer = packed < self._last[rows, None]
        some = nearer.any(axis=1)
        if not some.any():
            return
        rows, columns = rows[some], np.flatnonzero(nearer.any(axis=0))
        both = np.concatenate([self.packed[rows], packed[some][:, : columns[-1] + 1]], axis=1)
        both.partition(k - 1, axis=1)
        self.packed[rows], self._last[rows] = both[:, :k], both[:, k - 1]

    @classmethod
    def of_shares(cls, shares: Sequence[Array]) -> "Nearest":
        """Of what several ranks have kept for the same queries, each `packed` uint64 [n, k]."""
        found = cls(*shares[0].shape)
        rows = np.arange(len(shares[0]))
        for packed in shares:
            for first in range(0, len(rows), SCAN_QUERIES):
                found.join(rows[first : first + SCAN_QUERIES], packed[first : first + SCAN_QUERIES])
        return found

    def found(self) -> tuple[Array, Array]:
        """Ids int64 [n, k] and squared L2 fp32 [n, k], nearest first, id −1 at distance inf where there are fewer."""
        packed = np.sort(self.packed, axis=1)
        bits = (packed >> np.uint64(32)).astype(np.uint32)
        distances = np.where(bits & _SIGN, bits ^ _SIGN, ~bits).view(np.float32)
        ids = (packed & np.uint64(MOST_IDS - 1)).astype(np.int64)
        absent = packed == _NONE
        ids[absent], distances[absent] = -1, np.inf
        return ids, distances


def _packed(distances: Array, ids: Array) -> Array:
    bits = (np.asarray(distances, np.float32) + np.float32(0)).view(np.uint32)
    rising = np.where(bits & _SIGN, ~bits, bits | _SIGN).astype(np.uint64) << np.uint64(32)
    return np.where(ids < 0, _NONE, rising | ids.astype(np.uint64))


def scan_by_list(
    inner: Any,
    pool: ThreadPoolExecutor,
    vectors: Array,
    lists: Array,
    to_centroids: Array,
    k: int,
    share: tuple[int, int] | None = None,
) -> Nearest:
    """The k nearest keys of `vectors` fp32 [n, d] among those of `lists` int64 [n, P] (−1: none) within `share`.

    inner: an inverted file whose nprobe is 1; to_centroids: squared L2 fp32 [n, P]; share: lists [low, high), else all.
    Lists are dealt to the threads of `pool`, which decide about nothing. Raises DistlmError for more keys than ids of
    32 bits can number.
    """
    if inner.ntotal > MOST_IDS:
        raise DistlmError(f"knn.scan=lists: {inner.ntotal} keys, at most {MOST_IDS}; set knn.scan=queries")
    low, high = share or (0, inner.nlist)
    nearest, lock = Nearest(len(vectors), k), Lock()
    pairs = np.flatnonzero((lists.ravel() >= low) & (lists.ravel() < high))
    pairs = pairs[np.argsort(lists.ravel()[pairs], kind="stable")]
    numbers = lists.ravel()[pairs]
    starts = np.flatnonzero(np.diff(numbers, prepend=-2))
    stops = np.append(starts, len(numbers))[1:]

    def scan(group: tuple[int, int]) -> None:
        number = int(numbers[group[0]])
        size = inner.invlists.list_size(number)
        if not size:
            return
        for first in range(group[0], group[1], SCAN_QUERIES):
            own = pairs[first : min(first + SCAN_QUERIES, group[1])]
            asking = own // lists.shape[1]
            near = to_centroids.ravel()[own][:, None]
            distances, ids = inner.search_preassigned(
                vectors[asking], min(k, size), np.full((len(own), 1), number, np.int64), near
            )
            with lock:
                nearest.add(asking, distances, ids)

    list(pool.map(scan, zip(starts.tolist(), stops.tolist(), strict=True)))
    return nearest
