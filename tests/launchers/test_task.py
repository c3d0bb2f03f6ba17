"""What a job runs: exit codes, the hand-over to submitit, the guard's word, and a pickle of plain values."""

import os
import pickle
import signal
import subprocess
import sys

import pytest
from submitit.helpers import DelayedSubmission

from distlm.config.load import dump_config, load_config
from launchers import task as module
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


@pytest.mark.parametrize(("code", "words"), [(-15, "; requeued"), (1, "the requeue was refused")])
def test_scontrol_that_fails_or_dies_of_its_own_requeue(task, monkeypatch, capsys, code, words):
    ends_with(monkeypatch, 75)

    def handler(_number, _frame):
        raise subprocess.CalledProcessError(code, ["scontrol", "requeue", "5"])

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(SystemExit) as end:
            task()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert end.value.code == 75 and words in capsys.readouterr().err


def test_without_scontrol_it_says_so_at_the_start_and_ends_with_75(task, monkeypatch, capsys, tmp_path):
    ends_with(monkeypatch, 75)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "0" if name == "SLURM_PROCID" else "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        task()
    start, _, stop = capsys.readouterr().err.partition("stopped after a checkpoint")
    assert end.value.code == 75 and "WARNING: no scontrol" in start and "submit the same command again" in stop


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
