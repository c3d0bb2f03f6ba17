"""Which training blocks an update takes: a stream over shuffled epochs, computed from a few integers."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

_WORD = (1 << 64) - 1


def rows_for_update(seed: int, update: int, rows_per_update: int, n_rows: int) -> npt.NDArray[np.int64]:
    """Rows of update number `update` (0-based): int64 [rows_per_update], each in [0, n_rows).

    The updates read one stream: position p = update·rows_per_update + i is entry p mod n_rows of the permutation of
    epoch p // n_rows. Each epoch's permutation depends on (seed, epoch, n_rows) alone, not on ranks or on how far
    the run came, so a resumed run needs only its update number.
    """
    if n_rows < 1 or rows_per_update < 1 or update < 0:
        raise ValueError(f"update {update}, rows_per_update {rows_per_update}, n_rows {n_rows}")
    positions = np.arange(update * rows_per_update, (update + 1) * rows_per_update, dtype=np.int64)
    epochs, offsets = np.divmod(positions, n_rows)
    rows = np.empty(rows_per_update, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        inside = epochs == epoch
        rows[inside] = epoch_order(seed, epoch, n_rows)[offsets[inside]]
    return rows


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n_rows: int) -> npt.NDArray[np.int64]:
    """Permutation of 0..n_rows−1 of one epoch, read-only: int64 [n_rows].

    Sorts raw Philox words, because NumPy promises the words of a bit generator for ever and `permutation` not.
    """
    key = np.array([seed & _WORD, epoch], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(n_rows)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order
