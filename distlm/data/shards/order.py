"""The order in which training reads rows: a stream over shuffled epochs, computed from (seed, epoch, position) alone.

Two levels, so that a disk reads whole chunks and no state is kept: the chunks of all shards are permuted; each
POOL_CHUNKS of them in a row make a pool; the rows of a pool are permuted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

POOL_CHUNKS = 128
"""Chunks of a pool: 32,768 rows with chunks of 256. It is part of the order, so a change would break resuming."""
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Pool:
    """Rows that are shuffled among each other: chunks [≤ POOL_CHUNKS], rising; rows and places [rows of the pool]."""

    chunks: Rows
    rows: Rows
    """Row numbers in the order of reading."""
    places: Rows
    """Where these rows are when the chunks' rows are laid end to end."""


class ShardOrder:
    """Epochs over the rows of a split: position p is entry p mod N of epoch p // N, N the number of rows."""

    def __init__(self, chunk_rows: npt.ArrayLike, seed: int, pool_chunks: int = POOL_CHUNKS) -> None:
        """`chunk_rows`: rows of each chunk [C]; rows are numbered through the chunks."""
        self.chunk_rows = np.asarray(chunk_rows, np.int64)
        self.first_rows = np.concatenate([[0], np.cumsum(self.chunk_rows)])
        self.rows = int(self.first_rows[-1])
        self._seed, self._pool_chunks = seed & _WORD, pool_chunks
        if self.rows < 1:
            raise ValueError("no rows")
        self._epochs: dict[int, tuple[Rows, Rows]] = {}

    def locate(self, positions: Rows) -> Iterator[tuple[int, int, Rows, Rows]]:
        """(epoch, number of the pool, indices into `positions`, entries of that pool) for positions [n] ≥ 0."""
        epochs, offsets = np.divmod(positions, self.rows)
        for epoch in np.unique(epochs).tolist():
            inside = np.flatnonzero(epochs == epoch)
            starts = self._of_epoch(epoch)[1]
            pools = np.searchsorted(starts, offsets[inside], "right") - 1
            for pool in np.unique(pools).tolist():
                chosen = inside[pools == pool]
                yield epoch, pool, chosen, offsets[chosen] - starts[pool]

    def pool(self, epoch: int, number: int) -> Pool:
        """A pool of an epoch."""
        chunks = np.sort(self._of_epoch(epoch)[0][number * self._pool_chunks : (number + 1) * self._pool_chunks])
        counts = self.chunk_rows[chunks]
        ends = np.cumsum(counts)
        rows = np.arange(ends[-1]) + np.repeat(self.first_rows[chunks] - (ends - counts), counts)
        places = self._permutation(epoch, number + 1, len(rows))
        return Pool(chunks, rows[places], places)

    def rows_at(self, positions: Rows) -> tuple[Rows, Rows]:
        """(epochs [n], row numbers [n]) at some positions of the stream [n]."""
        epochs, rows = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        for epoch, number, inside, entries in self.locate(positions):
            epochs[inside], rows[inside] = epoch, self.pool(epoch, number).rows[entries]
        return epochs, rows

    def _of_epoch(self, epoch: int) -> tuple[Rows, Rows]:
        """Chunks in the order of an epoch [C], and the offset at which each pool begins."""
        if epoch not in self._epochs:
            chunks = self._permutation(epoch, 0, len(self.chunk_rows))
            ends = np.cumsum(self.chunk_rows[chunks])[self._pool_chunks - 1 :: self._pool_chunks]
            starts = np.concatenate([[0], ends])
            # An update may lie across the end of an epoch.
            self._epochs = {key: kept for key, kept in self._epochs.items() if abs(key - epoch) <= 1}
            self._epochs[epoch] = chunks, starts[starts < self.rows]
        return self._epochs[epoch]

    def _permutation(self, epoch: int, stream: int, count: int) -> Rows:
        # Sorted raw Philox words: NumPy promises the words of a bit generator for ever, and `permutation` not.
        key = np.array([self._seed, epoch], dtype=np.uint64)
        counter = np.array([0, 0, stream, 1], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=counter).random_raw(count)
        return np.argsort(words, kind="stable").astype(np.int64)


def update_positions(update: int, rows_per_update: int) -> Rows:
    """Positions of an update (0-based) in the stream, int64 [rows_per_update]."""
    if update < 0 or rows_per_update < 1:
        raise ValueError(f"update {update}, rows_per_update {rows_per_update}")
    return np.arange(update * rows_per_update, (update + 1) * rows_per_update, dtype=np.int64)


def rank_places(rows_per_update: int, micro_rows: int, rank: int, ranks: int) -> Rows:
    """Which of an update's rows a rank takes: of each micro-batch of `micro_rows` rows the rank's contiguous piece, one
    micro-batch after another: int64 [rows_per_update / ranks]."""
    if rows_per_update % micro_rows or micro_rows % ranks:
        raise ValueError(f"{rows_per_update} rows in micro-batches of {micro_rows} for {ranks} ranks")
    piece = micro_rows // ranks
    return np.arange(rows_per_update).reshape(-1, micro_rows)[:, rank * piece : (rank + 1) * piece].reshape(-1)
