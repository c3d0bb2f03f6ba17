"""Manifests of stores of which nothing else is there."""

from pathlib import Path

from distlm.datastore.manifest import MANIFEST
from distlm.datastore.records import Manifest, Shard
from distlm.datastore.settings import Settings


def settings(width: int = 32, key_dtype: str = "float16", rows_per_shard: int = 10, model: str = "m" * 32) -> Settings:
    """Of a store without a run."""
    return Settings(
        split="train", tap="last_ffn_input", context_window=8, block=1, batch_blocks=1, rows_per_shard=rows_per_shard,
        key_dtype=key_dtype, width=width, vocabulary=97, model=model, dictionary="d" * 32, tokens="t" * 32,
    )  # fmt: skip


def write_complete_manifest(folder: Path, shards: int = 1) -> None:
    """manifest.json of a finished store of so many shards of 10 rows."""
    named = [Shard(n, 10 * n, 10, 10 * n + 8, 10 * n + 18, "k" * 32, "v" * 32) for n in range(shards)]
    Manifest.of_store(settings(), 10 * shards, named, complete=True).write(folder / MANIFEST)
