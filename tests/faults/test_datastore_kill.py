"""A rank is killed at ten random moments; the same command, run until it is done, leaves the undisturbed bytes."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from support import ENVIRONMENT, mpirun, mpirun_command
from support.deadline import DEADLINE_S, until
from support.store import arguments, file_hashes, ready_run

from distlm.datastore.reader import Datastore
from distlm.datastore.records import UnitsFile
from distlm.datastore.verify import verify_datastore
from distlm.errors import DistlmError

pytestmark = pytest.mark.multiprocess

KILLS, RANKS, SEED = 10, 2, 20
# 20,000 rows in 170 shards, or in 680 units of one shard: many enough for ten kills at different places on a machine of
# any speed.
SHARDS = ["datastore.rows_per_shard=128"]
UNITS = ["datastore.rows_per_shard=1000000", "datastore.batch_blocks=1"]


def rank_processes(launcher: int) -> list[psutil.Process]:
    """The ranks below a launcher, by process id."""
    ranks = []
    for child in psutil.Process(launcher).children(recursive=True):
        try:
            if child.cmdline()[1:3] == ["-m", "distlm"]:
                ranks.append(child)
        except psutil.NoSuchProcess:
            continue
    return ranks


def on_disk(folder: Path) -> int:
    """Shards that are whole, and units of others that are recorded."""
    record = UnitsFile.peek(folder / ".units.json")
    return len(list(folder.glob(".shard-*.json"))) + (len(record.done) if record else 0)


def start_and_kill(words: list[str], folder: Path, chance: random.Random) -> bool:
    """Start the stage, kill one rank some shards or units and milliseconds later. False when it was done before."""
    command = mpirun_command(RANKS, ["-m", "distlm", "datastore", "write", *words])
    # Work, not seconds: how long the start takes depends on the machine, and killing an import proves nothing.
    wanted, pause = on_disk(folder) + chance.randrange(0, 12), chance.random() * 0.02
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(
            lambda: process.poll() is not None or (has_begun(process.pid, folder) and on_disk(folder) >= wanted),
            f"{wanted} shards or units",
        )
        time.sleep(pause)
        ranks = rank_processes(process.pid) if process.poll() is None else []
        if not ranks:
            return process.wait() != 0
        os.kill(chance.choice(ranks).pid, signal.SIGKILL)
        return process.wait(timeout=DEADLINE_S) != 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def has_begun(launcher: int, folder: Path) -> bool:
    """The ranks have their model: some file of a shard is being written, or was by this start."""
    try:
        start = psutil.Process(launcher).create_time()
        return any(lock.stat().st_mtime >= start for lock in folder.glob(".lock*"))
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


@pytest.mark.parametrize(
    "store", [pytest.param(SHARDS, id="shards", marks=pytest.mark.slow), pytest.param(UNITS, id="units")]
)
def test_ten_kills_change_nothing(tmp_path, store):
    config = ready_run(tmp_path, lines=2050, extra=store)
    shared = [
        *store,
        f"data.tokens_dir={config.run_dir}/tokens",
        f"datastore.checkpoint={config.run_dir}/checkpoints/step-00000012",
    ]
    undisturbed = arguments(tmp_path / "undisturbed", tmp_path / "text", shared)
    mpirun(1, ["-m", "distlm", "datastore", "write", *undisturbed])
    wanted = file_hashes(tmp_path / "undisturbed" / "datastore")
    assert Datastore.open(tmp_path / "undisturbed" / "datastore").rows > 18_000

    words, folder = arguments(tmp_path / "killed", tmp_path / "text", shared), tmp_path / "killed" / "datastore"
    chance = random.Random(SEED)
    progress, killed = [], 0
    for _ in range(KILLS):
        if not start_and_kill(words, folder, chance):
            break
        killed += 1
        progress.append(on_disk(folder))
        # A half-written store can never be read as a whole one.
        with pytest.raises(DistlmError, match="unfinished datastore"):
            Datastore.open(folder)
    assert killed == KILLS, f"the store was finished after {killed} kills; done after each: {progress}"
    assert progress == sorted(progress), "a restart lost finished work"
    assert progress[-1] > progress[0]

    print("shards or units after each kill:", progress)
    mpirun(RANKS, ["-m", "distlm", "datastore", "write", *words])
    assert file_hashes(folder) == wanted
    assert verify_datastore(folder) == []
