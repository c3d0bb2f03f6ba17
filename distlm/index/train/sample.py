"""The sample that trains an index, and the rows of it that each rank holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import numpy as np

from distlm.datastore.reader import Datastore
from distlm.index.build.sample import read_sample, sample_counts, sample_rows
from distlm.index.layout import Array

BLOCK = 4096
"""Vectors in one matrix product: faiss is fastest from here on."""
WIDE_BYTES = 1 << 30
"""A share of keys that is no larger as fp32 is held so: converting fp16 in each iteration costs a tenth of its time."""


class Sample(Protocol):
    """n keys, of which any rank can read any."""

    rows: int
    """n."""
    width: int
    """D."""

    def read(self, places: Array) -> Array:
        """Keys [m, D] at `places` int64 [m], rising, in the sample; fp16 or fp32."""


class ArraySample:
    """Keys in memory, [n, D]."""

    def __init__(self, keys: Array) -> None:
        self._keys = keys
        self.rows, self.width = keys.shape

    def read(self, places: Array) -> Array:
        return self._keys[places]


class StoreSample:
    """`rows` keys of a datastore, drawn by `seed`: of each shard as many as its rows ask for."""

    def __init__(self, datastore: Datastore, rows: int, seed: int) -> None:
        counts = sample_counts([shard.rows for shard in datastore.shards], rows)
        drawn = [sample_rows(seed, shard.index, shard.rows, count) + shard.first_row
                 for shard, count in zip(datastore.shards, counts, strict=True)]  # fmt: skip
        self._datastore = datastore
        self.numbers: Array = np.concatenate(drawn)
        """Their rows in the store, int64 [n], rising."""
        self.rows, self.width = len(self.numbers), datastore.width

    def read(self, places: Array) -> Array:
        """As Sample. Raises DistlmError for NaN or infinite keys."""
        rows, keys = self.numbers[places], np.empty((len(places), self.width), self._datastore.key_dtype)
        for shard in self._datastore.shards:
            low, high = np.searchsorted(rows, [shard.first_row, shard.first_row + shard.rows])
            if low < high:
                keys[low:high] = read_sample(self._datastore, shard.index, rows[low:high] - shard.first_row)
        return keys


@dataclass(frozen=True)
class Held:
    """The rows of a sample that one rank holds: whole blocks, which are the same on any number of ranks."""

    vectors: Array
    """[m, d] fp16 or fp32."""
    first: int
    """Place of the first of them among all."""
    total: int
    """Rows of all ranks."""
    half: bool = False
    """Every number is one that an fp16 holds."""

    @property
    def end(self) -> int:
        """Place after the last of them."""
        return self.first + len(self.vectors)

    def blocks(self) -> Iterator[Array]:
        """BLOCK rows at a time, the last fewer, in the type in which they are held."""
        for start in range(0, len(self.vectors), BLOCK):
            yield self.vectors[start : start + BLOCK]

    def at(self, places: Array) -> Array:
        """Those of the rows at `places` [n], rising, that are held here: fp32 [≤ n, d]."""
        low, high = np.searchsorted(places, [self.first, self.end])
        return self.vectors[places[low:high] - self.first].astype(np.float32)


def held_by(rank: int, size: int, sample: Sample, places: Array) -> Held:
    """This rank's share of the keys at `places`, rising. Raises DistlmError as Sample.read."""
    first, end = (min(len(places), ceil(len(places) / BLOCK) * part // size * BLOCK) for part in (rank, rank + 1))
    keys = sample.read(places[first:end])
    wide = keys.astype(np.float32) if 4 * keys.size <= WIDE_BYTES else keys
    return Held(wide, first, len(places), keys.dtype == np.float16)


def some_of(total: int, count: int, seed: int, use: int) -> Array:
    """`count` of the places 0 … total − 1, int64, rising; all where there are no more. `use` tells draws apart."""
    if count >= total:
        return np.arange(total, dtype=np.int64)
    random = np.random.Generator(np.random.Philox(key=np.array([seed, use], np.uint64)))
    return np.sort(random.choice(total, count, replace=False, shuffle=False))
