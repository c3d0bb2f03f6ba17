"""SIGKILL of a random rank at random moments of add and merge; the same command again gives the undisturbed files."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support import ENVIRONMENT, mpirun, mpirun_command
from support.deadline import DEADLINE_S, until
from support.index import DRIVER, driver, vectors, write_store

from distlm.index.records import CodesRecord

pytestmark = pytest.mark.multiprocess
SETTINGS = {"factory": "IVF64,SQ8"}
SMALL_UNITS = {"TEST_UNIT_BYTES": "6000"}
KILLS, SHARDS = 10, 60
LATEST = {"add": 0.8, "merge": 0.8}
"""Latest kill, in seconds after the stage began."""


def _trained(folder: Path, rows: int, per_shard: int) -> Path:
    write_store(folder / "datastore", vectors(rows), rows_per_shard=per_shard)
    mpirun(1, driver("train", folder, **SETTINGS))
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of 60 shards with a trained template."""
    return _trained(tmp_path_factory.mktemp("template"), 200 * SHARDS, 200)


@pytest.fixture(scope="module")
def added(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with all parts, never disturbed."""
    folder = shutil.copytree(template, tmp_path_factory.mktemp("added") / "run")
    mpirun(1, driver("add", folder, **SETTINGS))
    return Path(folder)


@pytest.fixture(scope="module")
def merged(added: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, merged, never disturbed."""
    folder = shutil.copytree(added, tmp_path_factory.mktemp("merged") / "run")
    mpirun(1, driver("merge", folder, **SETTINGS), check=True, **SMALL_UNITS)
    return Path(folder)


def _kill_one_rank(
    action: str, run_dir: Path, delay: float, choose: random.Random, begun: Callable[[], bool] | None = None
) -> bool:
    """Start two ranks, wait `delay` seconds after they began to work, kill one; whether that ended the run."""
    (run_dir / "started").unlink(missing_ok=True)
    begun = begun or (run_dir / "started").exists
    command = mpirun_command(2, driver(action, run_dir, **SETTINGS))
    process = subprocess.Popen(
        command, env={**ENVIRONMENT, **SMALL_UNITS}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    until(lambda: process.poll() is not None or begun(), "the start", pause=0.001)
    time.sleep(delay)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    ranks = [child for child in children if str(DRIVER) in _words(child) and "mpirun" not in _words(child)[0]]
    if ranks:
        choose.choice(ranks).send_signal(signal.SIGKILL)
    return process.wait(timeout=DEADLINE_S) != 0


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [""]
    except psutil.NoSuchProcess:
        return [""]


def _compare(found: Path, expected: Path) -> None:
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()) == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def _finished(action: str, run_dir: Path) -> bool:
    if action == "merge":
        return (run_dir / "index" / "index.json").exists()
    return len(list((run_dir / "index" / "parts").glob("part-*.json"))) == SHARDS


@pytest.mark.slow
@pytest.mark.parametrize("action", ["add", "merge"])
def test_killed_at_random_moments(action: str, template: Path, added: Path, merged: Path, tmp_path: Path) -> None:
    choose = random.Random(17)
    start, expected = (template, added) if action == "add" else (added, merged)
    run_dir = tmp_path / "run"
    shutil.copytree(start, run_dir)
    killed = unfinished = 0
    for _ in range(KILLS):
        # Each start finds what the kill before it left, as on a cluster; a finished stage begins anew.
        if _finished(action, run_dir):
            shutil.rmtree(run_dir)
            shutil.copytree(start, run_dir)
        killed += _kill_one_rank(action, run_dir, choose.random() * LATEST[action], choose)
        unfinished += not _finished(action, run_dir)
    # How many kills fall amid the work depends on the machine's speed; some must.
    assert killed and unfinished, "the stage was over before every kill: make it longer"
    mpirun(2, driver(action, run_dir, **SETTINGS), check=True, **SMALL_UNITS)
    _compare(run_dir / "index", expected / "index")


def test_kills_within_one_shard(tmp_path: Path) -> None:
    """Several ranks encode its units; a kill loses at most those of a round."""
    rows = 400_000
    choose, start = random.Random(3), _trained(tmp_path / "start", rows, rows)
    undisturbed = Path(shutil.copytree(start, tmp_path / "undisturbed"))
    mpirun(1, driver("add", undisturbed, **SETTINGS))
    run_dir = Path(shutil.copytree(start, tmp_path / "run"))
    parts, kept = run_dir / "index" / "parts", [0]

    def encoded() -> int:
        record = CodesRecord.peek(parts / ".codes.json")
        return len(record.done) if record else 0

    for _ in range(4):
        _kill_one_rank("add", run_dir, choose.random() * 0.01, choose, lambda: encoded() > kept[-1])
        kept.append(encoded())
    print("units after each kill:", kept)
    assert kept == sorted(kept) and kept[1] > 0, "a restart lost encoded units, or was over before it was killed"
    mpirun(2, driver("add", run_dir, **SETTINGS))
    _compare(run_dir / "index", undisturbed / "index")
