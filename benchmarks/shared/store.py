"""Datastores of made-up keys: finished, without a model or tokens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distlm.datastore.manifest import MANIFEST, keys_path, values_path
from distlm.datastore.records import Manifest, Shard
from distlm.datastore.settings import Settings
from distlm.runtime.files import file_hash

Draw = Callable[[int], tuple[npt.NDArray[np.float16], npt.NDArray[np.int32]]]
"""Number of rows → their keys [n, D] and values [n]."""


def settings(width: int, vocabulary: int, rows_per_shard: int, key_dtype: str = "float16") -> Settings:
    """Of a store whose model and tokens nobody asks for."""
    return Settings(
        split="train", tap="last_ffn_input", context_window=8, block=1, batch_blocks=1, rows_per_shard=rows_per_shard,
        key_dtype=key_dtype, width=width, vocabulary=vocabulary, model="0" * 32, dictionary="0" * 32, tokens="0" * 32,
    )  # fmt: skip


def write_store(folder: Path, rows: int, settings: Settings, draw: Draw) -> None:
    """A store of `rows` keys, shard by shard as `draw` gives them."""
    folder.mkdir(parents=True)
    shards = []
    for index, first in enumerate(range(0, rows, settings.rows_per_shard)):
        keys, values = draw(min(settings.rows_per_shard, rows - first))
        np.save(keys_path(folder, index), keys)
        np.save(values_path(folder, index), values)
        of_keys, of_values = file_hash(keys_path(folder, index)), file_hash(values_path(folder, index))
        shards.append(Shard(index, first, len(keys), first + 8, first + 8 + len(keys), of_keys, of_values))
    Manifest.of_store(settings, rows, shards, complete=True).write(folder / MANIFEST)


def random_keys(width: int, seed: int = 0) -> Draw:
    """Keys N(0, 1), all of word 0."""
    random = np.random.default_rng(seed)

    def draw(count: int) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int32]]:
        keys = random.standard_normal((count, width), np.float32).astype(np.float16)
        return keys, np.zeros(count, np.int32)

    return draw


def clustered_keys(rows: int, width: int, vocabulary: int, seed: int = 0) -> Draw:
    """Keys around rows / 500 centres, each of which has one word."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((max(16, rows // 500), width), np.float32)

    def draw(count: int) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int32]]:
        cluster = random.integers(0, len(centres), count)
        noise = random.standard_normal((count, width), np.float32)
        return (0.5 * centres[cluster] + 0.5 * noise).astype(np.float16), (cluster % vocabulary).astype(np.int32)

    return draw
