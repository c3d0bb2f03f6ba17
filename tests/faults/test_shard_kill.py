"""A run that makes shards is killed at several places; the same command, run again, leaves the usual bytes."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT, write_text
from support.deadline import DEADLINE_S
from support.drivers import shard as driver
from support.shards import hashes, make_shards

from distlm.data.shards.reader import ShardRows
from distlm.errors import DistlmError
from distlm.runtime.lock import is_lock


def run(folder: Path, text: Path, place: str, number: int) -> int:
    arguments = [str(folder), str(text), place, str(number)]
    return subprocess.run(
        [sys.executable, driver.__file__, *arguments], env=ENVIRONMENT, capture_output=True, timeout=DEADLINE_S
    ).returncode


def test_killed_at_several_places_then_run_again(tmp_path: Path) -> None:
    text, folder = write_text(tmp_path / "text", train_lines=400), tmp_path / "run/shards"
    whole: list[int] = []
    # In the second shard, between a shard and its marker, and when all shards are there.
    for place, number in (("vocabulary", 1), ("chunk", 25), ("marker", 2), ("manifest", 1)):
        assert run(tmp_path / "run", text, place, number) == -9
        whole.append(len(list(folder.glob(".*-*.json"))))
        with pytest.raises(DistlmError, match="no finished shards here"):
            ShardRows.open(folder, "train")
        if place == "chunk":
            assert list(folder.glob(".*.tmp")), "killed while a shard was being written"
    assert whole[0] == 0 and 0 < whole[1] < whole[2] < whole[3]
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    make_shards(tmp_path / "run", text)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")} == written
    make_shards(tmp_path / "unharmed", text)
    assert hashes(folder) == hashes(tmp_path / "unharmed/shards")
    assert not [path.name for path in folder.glob(".*") if not is_lock(path)]
