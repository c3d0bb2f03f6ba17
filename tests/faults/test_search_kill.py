"""A search killed in each phase, or stopped by a signal, is finished by the same command with the same bytes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT
from support.deadline import DEADLINE_S, until
from support.knn import copy_run, in_stage
from support.store import arguments, file_hashes, ready_run

from distlm.datastore.writer import run_datastore_write
from distlm.errors import EXIT_STOPPED, DistlmError
from distlm.index import run_index_build
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.stage import run_search
from distlm.runtime.rundir import RunDir

# One block a unit: about 45 units of both splits, so that a signal meets the work half done.
UNITS = ["knn.blocks_per_unit=1", "knn.batch_blocks=1"]


def interrupt(words: list[str], folder: Path, pattern: str, number: int) -> int:
    """Start a search, signal it as soon as some file of `pattern` is there, and give its exit code."""
    process = subprocess.Popen([sys.executable, "-m", "distlm", "knn", "search", *words], env=ENVIRONMENT)
    try:
        until(lambda: process.poll() is not None or any(folder.glob(pattern)), pattern, pause=0.001)
        process.send_signal(number)
        return process.wait(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_kills_in_every_phase_and_a_stop_change_nothing(tmp_path):
    config = ready_run(tmp_path, lines=800, extra=UNITS)
    in_stage("datastore", config, run_datastore_write)
    in_stage("index", config, run_index_build)
    run = RunDir.of(copy_run(config, tmp_path / "killed", *UNITS))
    in_stage("knn", config, run_search)
    whole = file_hashes(Path(config.run_dir) / "neighbours")
    folder, words = run.neighbours("valid").parent, arguments(tmp_path / "killed", tmp_path / "text", UNITS)

    ended = [
        interrupt(words, folder, "valid/found/unit-00003", signal.SIGKILL),
        interrupt(words, folder, "valid/found/unit-00010", signal.SIGUSR1),
        interrupt(words, folder, "valid/rescore/*-00002.npy", signal.SIGKILL),
        interrupt(words, folder, "valid/unit-00001", signal.SIGKILL),
    ]
    assert ended == [-signal.SIGKILL, EXIT_STOPPED, -signal.SIGKILL, -signal.SIGKILL]
    with pytest.raises(DistlmError, match="has not finished"):
        Neighbours.open(run.neighbours("valid"))
    assert subprocess.run([sys.executable, "-m", "distlm", "knn", "search", *words], env=ENVIRONMENT).returncode == 0
    assert file_hashes(run.root / "neighbours") == whole


@pytest.mark.slow
def test_a_kill_while_the_lists_are_shared_changes_nothing(tmp_path):
    lists = [*UNITS, "knn.scan=lists"]
    config = ready_run(tmp_path, lines=800, extra=lists)
    in_stage("datastore", config, run_datastore_write)
    in_stage("index", config, run_index_build)
    run = RunDir.of(copy_run(config, tmp_path / "killed", *lists))
    in_stage("knn", config, run_search)
    folder, words = run.neighbours("valid").parent, arguments(tmp_path / "killed", tmp_path / "text", lists)
    # The units that are left are another batch, in which queries stand elsewhere.
    assert interrupt(words, folder, "valid/found/unit-00003", signal.SIGKILL) == -signal.SIGKILL
    assert not (folder / "valid" / "manifest.json").exists()
    assert subprocess.run([sys.executable, "-m", "distlm", "knn", "search", *words], env=ENVIRONMENT).returncode == 0
    assert file_hashes(run.root / "neighbours") == file_hashes(Path(config.run_dir) / "neighbours")
