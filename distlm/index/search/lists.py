"""A search list by list: each inverted list is read once for all queries of a batch that probe it.

Query by query, every query reads all its lists; from memory that is as fast, but an index that is larger than memory
would be read from the disk again and again. (The order of faiss's contrib.big_batch_search.)
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from distlm.index.faiss_module import require_faiss
from distlm.index.layout import Array

BATCH = 8192
"""Queries that share a reading of the lists. Memory: BATCH × k × 12 bytes."""


def scan_by_list(
    inner: Any, pool: ThreadPoolExecutor, vectors: Array, lists: Array, to_centroids: Array, k: int
) -> tuple[Array, Array]:
    """The k nearest keys of `vectors` fp32 [n, d] among those of `lists` int64 [n, P] (−1: none).

    inner: an inverted file whose nprobe is 1; to_centroids: squared L2 fp32 [n, P]. Returns squared L2 fp32 [n, k],
    ascending, and ids int64 [n, k], −1 where there are fewer. Lists are dealt to the threads of `pool`, and their
    results are taken in the order of the lists, so that threads decide about nothing.
    """
    heap = require_faiss().ResultHeap(len(vectors), k)
    pairs = np.argsort(lists, axis=None, kind="stable")
    numbers = lists.ravel()[pairs]
    starts = np.flatnonzero(np.diff(numbers, prepend=-2))
    stops = np.append(starts[1:], len(numbers))

    def scan(group: tuple[int, int]) -> tuple[Array, Array, Array] | None:
        own = pairs[group[0] : group[1]]
        number = int(numbers[group[0]])
        size = inner.invlists.list_size(number) if number >= 0 else 0
        if not size:
            return None
        asking = own // lists.shape[1]
        near = to_centroids.ravel()[own][:, None]
        distances, ids = inner.search_preassigned(
            vectors[asking], min(k, size), np.full((len(own), 1), number, np.int64), near
        )
        return asking, distances, ids

    for found in pool.map(scan, zip(starts.tolist(), stops.tolist(), strict=True)):
        if found is not None:
            asking, distances, ids = found
            heap.add_result_subset(asking, distances, ids)
    heap.finalize()
    return heap.D, heap.I
