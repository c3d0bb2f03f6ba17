"""Shards made in this process from tiny texts."""

import json
from pathlib import Path
from typing import Any

import xxhash

from distlm.config import LaunchConfig
from distlm.data.shards.config import ShardsConfig
from distlm.data.shards.stage import ShardSummary, run_shard
from distlm.data.shards.wordpiece import SPECIALS, WordPiece
from distlm.models.plm.config import PlmRun
from distlm.runtime.ranks.world import World
from distlm.runtime.stage import Stage, open_stage

SMALL = {"row_tokens": 16, "chunk_rows": 4, "shard_text": 3000, "vocabulary_size": 80}
"""Several shards of several chunks from a text of some hundred lines."""


def shard_config(run: Path, text: Path | str = "", **settings: Any) -> PlmRun:
    """A configuration that makes shards in `run`/shards, of SMALL and `settings` of ShardsConfig."""
    shards = ShardsConfig(**{"text_dir": str(text), **SMALL, **settings})
    return PlmRun(run_dir=str(run), shards=shards, launch=LaunchConfig(threads=1))


def make_shards(run: Path, text: Path | str = "", **settings: Any) -> ShardSummary:
    """Run the stage; its summary."""
    with open_stage("shard", shard_config(run, text, **settings), World(0, 1, 0, 1, "here", "single")) as stage:
        return run_shard(stage)


def stop_now(stage: Stage) -> None:
    """As a signal would."""
    stage.stop.reason = "SIGUSR1"


def hashes(folder: Path) -> dict[str, str]:
    """Hash of every file that is not hidden."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in files}


def manifest(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
    return tree


def letters() -> WordPiece:
    """A vocabulary of the letters and digits, alone and inside words: every word of them has pieces."""
    signs = "abcdefghijklmnopqrstuvwxyz0123456789.,=[]"
    return WordPiece((*SPECIALS, *signs, *(f"##{sign}" for sign in signs)), True)
