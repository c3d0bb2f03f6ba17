"""One, two and three ranks write the same neural cache; a signal to one of them stops all, and they go on."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from support import ENVIRONMENT, mpirun, mpirun_command
from support.deadline import DEADLINE_S, until
from support.knn import in_stage
from support.lstm import UNTRAINED, untrained_lstm
from support.store import arguments, file_hashes, ready_run, tiny_config

from distlm.errors import EXIT_STOPPED
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.tune.stage import run_tune

pytestmark = pytest.mark.multiprocess
CACHE = ["cache.windows=[5,40]", "cache.thetas=[0.01,0.1]", "knn.blocks_per_unit=2", "knn.batch_blocks=2"]


CARRIED = [*CACHE, *UNTRAINED, "knn.carry=true", "knn.context_window=0"]


@pytest.mark.parametrize("ready, settings", [(ready_run, CACHE), (untrained_lstm, CARRIED)], ids=["blocks", "carried"])
def test_any_number_of_ranks_writes_the_same_cache(tmp_path, ready, settings):
    """With the state carried over, too: one rank reads the split, all compute its blocks."""
    config = ready(tmp_path, extra=settings)

    def files(ranks: int) -> dict[str, dict[str, str]]:
        run_dir = tmp_path / f"ranks{ranks}"
        shutil.copytree(config.run_dir, run_dir)
        words = arguments(run_dir, tmp_path / "text", settings)
        done = mpirun(ranks, ["-m", "distlm", "knn", "cache", *words])
        assert done.stdout.count("knn cache:") == 1, done.stdout
        for function in (run_tune, run_evaluate):
            in_stage("knn", tiny_config(run_dir, tmp_path / "text", settings), function)
        return {name: file_hashes(run_dir / name) for name in ("states", "cache", "losses")}

    one = files(1)
    assert len([name for name in one["cache"] if name.endswith("log_probs.npy")]) > 6
    for ranks in (2, 3):
        assert files(ranks) == one


@pytest.mark.slow
def test_stopped_and_killed_on_two_ranks_then_finished_by_one(tmp_path):
    units = [*CACHE, "knn.blocks_per_unit=1", "knn.batch_blocks=1"]
    config = ready_run(tmp_path, lines=1200, extra=units)
    run_dir = tmp_path / "killed"
    shutil.copytree(config.run_dir, run_dir)
    words = arguments(run_dir, tmp_path / "text", units)
    command = mpirun_command(2, ["-m", "distlm", "knn", "cache", *words])

    def interrupt(pattern: str, number: int) -> int:
        process = subprocess.Popen(command, env=ENVIRONMENT)
        try:
            until(lambda: process.poll() is not None or any(run_dir.glob(pattern)), pattern, pause=0.001)
            process.send_signal(number)
            return process.wait(timeout=DEADLINE_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    assert interrupt("states/valid/unit-00003", signal.SIGUSR1) == EXIT_STOPPED
    assert not (run_dir / "cache").exists()
    assert interrupt("cache/valid/unit-00004", signal.SIGKILL) != 0
    assert not (run_dir / "cache" / "test" / "manifest.json").exists()
    mpirun(1, ["-m", "distlm", "knn", "cache", *words])
    mpirun(1, ["-m", "distlm", "knn", "cache", *arguments(Path(config.run_dir), tmp_path / "text", units)])
    for name in ("states", "cache"):
        assert file_hashes(run_dir / name) == file_hashes(tmp_path / "run" / name)
