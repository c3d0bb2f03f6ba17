"""The training sample: the same keys whatever the rank count."""

from itertools import pairwise

import numpy as np

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.layout import Array


def sample_counts(shard_rows: list[int], sample: int) -> list[int]:
    """Keys sampled from each shard: proportional to its rows, summing to min(sample, all rows) exactly."""
    total = sum(shard_rows)
    sample = min(sample, total)
    ends = np.cumsum(shard_rows, dtype=object)
    upto = [0, *(int(end) * sample // total for end in ends)]
    return [after - before for before, after in pairwise(upto)]


def sample_rows(seed: int, shard: int, rows: int, count: int) -> Array:
    """`count` of a shard's `rows` row numbers, int64, ascending; a pure function of its arguments."""
    if count == rows:
        return np.arange(rows, dtype=np.int64)
    random = np.random.Generator(np.random.Philox(key=np.array([seed, shard], np.uint64)))
    return np.sort(random.choice(rows, count, replace=False, shuffle=False))


def read_sample(datastore: Datastore, shard: int, rows: Array) -> Array:
    """Keys [len(rows), D] of one shard in their stored dtype. Raises DistlmError for NaN or infinite keys."""
    keys = np.asarray(datastore.keys(shard)[rows])
    check_finite(keys, datastore, shard, rows)
    return keys


def check_finite(keys: Array, datastore: Datastore, shard: int, rows: Array) -> None:
    """DistlmError naming the shard and row of the first NaN or infinite key; `rows` [n] are rows in the shard."""
    bad = not_finite(keys)
    if len(bad):
        raise DistlmError(
            f"{datastore.folder}: shard {shard} row {int(rows[bad[0]])} has NaN or infinite keys ({len(bad)} such rows "
            f"among {len(rows)} read); the model that wrote them overflowed: write the datastore again with "
            "datastore.key_dtype=float32 or another checkpoint"
        )


def not_finite(keys: Array) -> Array:
    """Rows of `keys` [n, D] that hold a NaN or an infinite number, int64, rising."""
    wide = np.asarray(keys, np.float32)
    # The sum of squares is finite unless a value is not, or they overflow: one pass without a mask of the batch.
    if np.isfinite(np.einsum("nd,nd->n", wide, wide)).all():
        return np.empty(0, np.int64)
    return np.flatnonzero(~np.isfinite(wide).all(axis=1))
