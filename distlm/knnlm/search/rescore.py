"""Exact squared L2 distances from the true keys, by one sequential pass over the key shards.

An exact score needs the key of every neighbour: for WikiText-103 that is 223 million random reads of 2 kB per pass
when they are read query by query. Here the (query, neighbour) pairs of many units are sorted by row, and each shard
is read once, in order, in chunks; the pairs of a chunk form a sparse matrix [rows of the chunk, queries] whose dot
products are computed where they are wanted and nowhere else (`torch.sparse.sampled_addmm`).

Work is split by (group of units, range of rows), so that the ranks together read the store once per group, not once
per rank. The groups are fixed by the plan (GROUP_BYTES) and every pair's dot product is computed alone, so that the
distances do not depend on the number of ranks, on threads or on the chunking.

Precision: d = |q|² + |k|² − 2 q·k with the dot product in fp32, the norms and the sum in fp64. Measured against fp64 on
layer-norm outputs: largest error 9e-5 at width 256, 5e-4 at width 1024 (|k|² ≈ 1000), which is less than the sum of
squared differences in fp32 gives (7e-4 and 5e-3), and no smaller after centring the keys. The error grows with
|q|² + |k|², not with d: hidden states that are not normalised have a few large values that all of them share, and d is
then what is left of two far larger numbers. So a d below CANCELLED of that sum is taken anew as Σ (q − k)² in fp32,
whose error is about 1e-6 of d. Few pairs of layer-norm outputs are so near.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from distlm.datastore.plan import Unit as Range
from distlm.datastore.plan import cut
from distlm.index.pairs import SortedPairs

GROUP_BYTES = 4 << 30
"""Queries and sorted pairs of one group of units held in memory by a rank: 4·D bytes a query, 8 a pair."""
CHUNK_BYTES = 32 << 20
"""Keys read at once, as fp32."""
SORT_CELLS = 1 << 16
"""Neighbours sorted at once: what is made of them stays in a core's cache, in memory that is used again."""
CHUNK_ROWS = 1 << 16
"""Most rows of a chunk: row numbers within a chunk are sorted as uint16."""
CANCELLED = 2.0**-8
"""Share of |q|² + |k|² below which the product's rounding, up to 1e-6 of that sum, is too large beside a distance."""
DIFFERENCE_CELLS = 1 << 18
"""Numbers of the differences that are held at once: a core's cache has them."""


RANGES = 4096
"""Ranges of rows that a store is scored in, where it has the rows."""
LEAST_RANGE = 4096
"""Rows of a range at least, but of a shard's last."""


def row_ranges(shards: Sequence[int]) -> list[Range]:
    """The ranges of rows of shards of so many rows, in order; none goes beyond its shard."""
    step = max(LEAST_RANGE, -(-sum(shards) // RANGES))
    return [unit for number, rows in enumerate(shards) for unit in cut(number, rows, step)]


def plan_groups(queries: Sequence[int], k: int, width: int, budget: int = GROUP_BYTES) -> list[list[int]]:
    """Consecutive units whose queries and pairs fit `budget` bytes together, at least one unit each.

    `queries` holds the number of queries of every unit.
    """
    groups: list[list[int]] = []
    used = 0
    for unit, count in enumerate(queries):
        size = count * (4 * width + 8 * k)
        if not groups or used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(unit)
        used += size
    return groups


def passes(splits: Sequence[int], k: int, width: int) -> int:
    """How often the keys are read to score the queries of these splits, at least: once for each group.

    `splits` holds the number of queries of each split.
    """
    return sum(-(-count * (4 * width + 8 * k) // GROUP_BYTES) for count in splits)


class GroupScorer:
    """Scores the pairs of one group of units against key shards.

    `queries` of all units of the group [Q, D] in any float dtype, `pairs` per unit, `counts` queries per unit. With
    `dot` a distance is the negated dot product instead.
    """

    def __init__(
        self, queries: npt.NDArray[np.floating], pairs: Sequence[SortedPairs], counts: Sequence[int], dot: bool = False
    ) -> None:
        self._dot = dot
        self._queries = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
        self._norms = _squared_norms(self._queries)
        self._largest_norm = float(self._norms.max())
        self._pairs = pairs
        self._first_query = np.concatenate(([0], np.cumsum(counts)))

    def shard(
        self, keys: np.memmap, shard_row: int, begin: int = 0, count: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Squared L2 of every pair whose row is one of `count` rows (None: all) of a shard, from its row `begin` on:
        fp32, unit after unit, each in its sorted order.

        `keys` [rows, D] of the shard, memory-mapped; `shard_row` the store row of its first key.
        """
        first_row = shard_row + begin
        count = len(keys) - begin if count is None else count
        bounds = [pairs.bounds([first_row, first_row + count]) for pairs in self._pairs]
        starts = np.concatenate(([0], np.cumsum([high - low for low, high in bounds])))
        result = np.empty(int(starts[-1]), np.float32)
        cursor = [int(low) for low, _ in bounds]
        low, high = self._wanted(bounds, first_row)
        for place, chunk in read_chunks(keys, (begin + low, begin + high)):
            first = place - begin
            edge = first_row + first + len(chunk)
            rows, columns, places = [], [], []
            for unit, pairs in enumerate(self._pairs):
                low, high = cursor[unit], int(pairs.bounds([edge])[0])
                cursor[unit] = high
                if low == high:
                    continue
                rows.append((pairs.rows[low:high] - (first_row + first)).astype(np.uint16))
                queries = (pairs.places[low:high] // pairs.k).astype(np.int32, copy=False)
                columns.append(queries + np.int32(self._first_query[unit]))
                start = int(starts[unit] + low - bounds[unit][0])
                places.append(np.arange(start, start + high - low))
            if rows:
                self._score(chunk, np.concatenate(rows), np.concatenate(columns), np.concatenate(places), result)
        return result

    def _wanted(self, bounds: Sequence[npt.NDArray[np.int64]], first_row: int) -> tuple[int, int]:
        """First and past-last row, counted from `first_row`, that any pair needs."""
        spans = [(pairs.rows[low], pairs.rows[high - 1]) for pairs, (low, high) in zip(self._pairs, bounds, strict=True)
                 if high > low]  # fmt: skip
        if not spans:
            return 0, 0
        return int(min(low for low, _ in spans)) - first_row, int(max(high for _, high in spans)) + 1 - first_row

    def _score(
        self,
        keys: torch.Tensor,
        rows: npt.NDArray[np.uint16],
        columns: npt.NDArray[np.int32],
        places: npt.NDArray[np.int64],
        result: npt.NDArray[np.float32],
    ) -> None:
        if len(self._pairs) > 1:
            order = np.argsort(rows, kind="stable")
            rows, columns, places = rows[order], columns[order], places[order]
        starts = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=len(keys)))))
        row, column = torch.from_numpy(rows.astype(np.int32)), torch.from_numpy(columns)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            wanted = torch.sparse_csr_tensor(
                torch.from_numpy(starts.astype(np.int32)), column, torch.zeros(len(row)),
                (len(keys), len(self._queries)), check_invariants=False,
            )  # fmt: skip
        # The transposed view keeps each query contiguous: no copy of the queries is made.
        dots = torch.sparse.sampled_addmm(wanted, keys, self._queries.t(), beta=0.0).values()
        if self._dot:
            result[places] = dots.neg_().numpy()
            return
        norms = _squared_norms(keys)
        distances = dots.double().mul_(-2).add_(norms[row]).add_(self._norms[column])
        result[places] = distances.float().numpy()
        # The bound of the largest norms leaves few pairs, whose own bounds decide.
        near = torch.nonzero(distances < CANCELLED * (float(norms.max()) + self._largest_norm)).squeeze(1)
        near = near[distances[near] < CANCELLED * (norms[row[near]] + self._norms[column[near]])]
        if len(near):
            result[places[near.numpy()]] = self._differences(keys, row[near], column[near])

    def _differences(self, keys: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> npt.NDArray[np.float32]:
        """Σ (q − k)² of the pairs (row [n] of `keys`, column [n] of the queries): fp32 [n], each summed alone."""
        found, step = np.empty(len(row), np.float32), max(1, DIFFERENCE_CELLS // keys.shape[1])
        for first in range(0, len(row), step):
            pairs = slice(first, first + step)
            difference = self._queries[column[pairs]].sub_(keys[row[pairs]]).numpy()
            np.einsum("nd,nd->n", difference, difference, out=found[pairs])
        return found


def unit_distances(
    pairs: SortedPairs, queries: int, pieces: Sequence[npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """A unit's distances [q, k] from its pairs' distances in sorted order, shard after shard; inf without neighbour."""
    distances = np.full(queries * pairs.k, np.inf, np.float32)
    distances[pairs.places] = np.concatenate([np.empty(0, np.float32), *pieces])
    return distances.reshape(queries, pairs.k)


def from_nearest(distances: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Distances of any sign [q, k] less the least of each row: a softmax over a row does not change. inf stays."""
    least = distances.min(axis=1, initial=np.inf, keepdims=True)
    return distances - np.where(np.isfinite(least), least, np.float32(0))


def nearest_first(
    ids: npt.NDArray[np.int64], distances: npt.NDArray[np.float32], values: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Each row [k] by rising distance, ties by rising id, absent neighbours (id −1, distance inf) last.

    Distances below zero (rounding of an index's encoded distances) become 0.
    """
    kinds = (np.int64, np.float32, np.int32)
    sorted_ids, sorted_distances, sorted_values = (np.empty(ids.shape, kind) for kind in kinds)
    step = max(1, SORT_CELLS // max(1, ids.shape[1]))
    for first in range(0, len(ids), step):
        rows = slice(first, first + step)
        near, order = _order(np.asarray(ids[rows]), distances[rows])
        sorted_ids[rows] = np.take_along_axis(ids[rows], order, 1)
        sorted_distances[rows] = np.take_along_axis(near, order, 1)
        sorted_values[rows] = np.take_along_axis(values[rows], order, 1)
    return sorted_ids, sorted_distances, sorted_values


def _order(
    ids: npt.NDArray[np.int64], distances: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The distances without negative ones, inf where absent, and the order of each row: both [q, k]."""
    absent = ids < 0
    # Adding 0 turns −0 into +0: the bits of −0, read as an integer, would be a large number.
    distances = np.where(absent, np.float32(np.inf), np.maximum(distances, 0) + np.float32(0))
    if int(ids.max(initial=0)) >= 2**32:
        return distances, np.lexsort((ids, distances), axis=1)
    # The bits of a float ≥ 0 rise with it: one sort of unique 64-bit numbers in place of two stable ones.
    keys = distances.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.where(absent, 0, ids).astype(np.uint64)
    return distances, np.argsort(keys, axis=1)


def read_chunks(keys: np.memmap, wanted: tuple[int, int]) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows [wanted) of a shard in order, as (first row, fp32 [rows, D]); the tensor is reused by the next chunk.

    Reads with read(2) rather than through the memory map: no page faults, and the next chunk is read ahead.
    """
    first, last = wanted
    width = keys.shape[1]
    step = max(1, min(CHUNK_ROWS, CHUNK_BYTES // (4 * width)))
    row_bytes = width * keys.dtype.itemsize
    raw = np.empty((min(step, max(last - first, 0)), width), keys.dtype)
    single = torch.empty(raw.shape, dtype=torch.float32)
    descriptor = os.open(str(keys.filename), os.O_RDONLY)
    try:
        for start in range(first, last, step):
            rows = min(step, last - start)
            offset = int(keys.offset) + start * row_bytes
            _read_full(descriptor, raw[:rows], offset, Path(str(keys.filename)))
            os.posix_fadvise(descriptor, offset + rows * row_bytes, step * row_bytes, os.POSIX_FADV_WILLNEED)
            yield start, single[:rows].copy_(torch.from_numpy(raw[:rows]))
    finally:
        os.close(descriptor)


def _read_full(descriptor: int, into: npt.NDArray[np.floating], offset: int, path: Path) -> None:
    view = memoryview(into.reshape(-1).view(np.uint8).data)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise OSError(f"{path}: ends at byte {offset + done}")
        done += count


def _squared_norms(matrix: torch.Tensor) -> torch.Tensor:
    """|row|² in fp64: [rows], each summed alone, whatever rows stand beside it."""
    rows, step = matrix.numpy(), 256
    sums = [np.square(rows[i : i + step], dtype=np.float64).sum(axis=1) for i in range(0, len(rows), step)]
    return torch.from_numpy(np.concatenate(sums))
