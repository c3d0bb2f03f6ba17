"""What a job runs: exit codes, the hand-over to submitit, the guard's word, and a pickle of plain values."""

import os
import pickle
import signal
import sys

import pytest
from submitit.helpers import DelayedSubmission

from distlm.config.load import dump_config, load_config
from distlm.runtime.rundir import RunDir
from launchers import task as module
from launchers.jobs import record_job
from launchers.task import StageFailed, StageTask, run_verb


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A training task as the local executor starts it; the verb's exit code is TASK.code."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(load_config("demo", [f"run_dir={tmp_path / 'run'}"])), "utf-8")
    for name, value in (("EXECUTOR", "local"), ("FOLDER", str(tmp_path)), ("LOCAL_JOB_ID", "5"),
                        ("LOCAL_GLOBALID", "0"), ("LOCAL_NTASKS", "1")):  # fmt: skip
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    return StageTask("train", ("train",), str(recipe), (), 1, 1)


def ends_with(monkeypatch, code):
    monkeypatch.setattr(module, "run_verb", lambda arguments, ranks: code)


def test_it_pickles_small_and_by_name(task):
    data = pickle.dumps(task)
    assert len(data) < 1000 and pickle.loads(data) == task


def test_an_error_of_the_stage_is_the_jobs(task, monkeypatch):
    ends_with(monkeypatch, 1)
    with pytest.raises(StageFailed, match="distlm train ended with exit code 1"):
        task()


def test_success_without_the_marker_is_none(task, monkeypatch):
    ends_with(monkeypatch, 0)
    with pytest.raises(StageFailed, match="left no completion marker"):
        task()


def test_stopped_on_rank_0_calls_the_handler_that_was_there(task, monkeypatch):
    ends_with(monkeypatch, 75)
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(StageFailed, match="submitit did not requeue"):
            task()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [signal.SIGUSR2]


@pytest.fixture
def on_slurm(task, monkeypatch, tmp_path):
    """The same as rank 0 of job 1 of Slurm, which has no commands there."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for name in ("JOB_ID", "PROCID", "STEP_NUM_TASKS", "NTASKS"):
        monkeypatch.setenv(f"SLURM_{name}", "0" if name == "PROCID" else "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    return task


def test_without_scontrol_the_batch_script_asks_for_the_requeue(on_slurm, monkeypatch, capsys, tmp_path):
    ends_with(monkeypatch, 75)
    with pytest.raises(SystemExit) as end:
        on_slurm()
    start, _, stop = capsys.readouterr().err.partition("stopped after a checkpoint")
    assert end.value.code == 75 and "requeue: the batch script owns it" in start
    assert "the batch script asks for the requeue (no scontrol here)" in stop
    # The other ranks need not wait for Slurm to end them.
    assert (tmp_path / "1_0_ended").exists()


def test_a_start_of_a_cancelled_job_ends_before_it_does_anything(on_slurm, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(module, "run_verb", lambda arguments, ranks: pytest.fail("it ran"))
    record_job(RunDir(tmp_path / "run"), "train", "1", "submitit", "1", cancelled=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(StageFailed, match="job 1 was cancelled"):
        on_slurm()
    assert "distlm requeue lets it go on" in capsys.readouterr().err


def test_the_debug_executor_ends_with_75(task, monkeypatch):
    ends_with(monkeypatch, 75)
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "d")
    with pytest.raises(SystemExit) as end:
        task()
    assert end.value.code == 75


def test_checkpoint_is_the_same_task_until_the_guard_ends_it(task, capsys):
    again = task.checkpoint()
    assert isinstance(again, DelayedSubmission) and again.function == task
    assert task.checkpoint() is None
    assert "guard: not requeued" in capsys.readouterr().err


def test_a_verb_runs_here_and_leaves_the_environment_as_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KEPT", "1")
    before = dict(os.environ)
    assert run_verb(["config", "demo", f"run_dir={tmp_path}"], 1) == 0
    assert "tokens_per_sample" in capsys.readouterr().out
    assert run_verb(["config", "demmo"], 1) == 2
    assert dict(os.environ) == before


def test_exits_that_are_not_distlms_pass_through(monkeypatch):
    """submitit ends a task from inside its signal handler, with codes of its own."""
    monkeypatch.setattr("distlm.cli.main", lambda arguments: sys.exit(144))
    with pytest.raises(SystemExit) as end:
        run_verb([], 1)
    assert end.value.code == 144
