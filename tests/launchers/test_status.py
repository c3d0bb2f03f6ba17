"""Status, logs, cancel and requeue without Slurm: from the files of a run alone."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
from support import ENVIRONMENT, TINY
from support.deadline import DEADLINE_S
from support.present import present

from distlm.config.load import dump_config, load_config
from distlm.errors import DistlmError, UsageError
from distlm.runtime.metrics import MetricsFile
from distlm.runtime.progress import Progress as Counter
from distlm.runtime.progress import record_progress
from distlm.runtime.rundir import RunDir
from launchers import jobs
from launchers.guard import attempts
from launchers.jobs import Submission, named_runs, record_job, submissions
from launchers.logs import find_logs, newest_logs, of_rank
from launchers.records import RestartLine
from launchers.stages import slurm
from launchers.status import _seconds, as_text, read_progress, status_of


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    """A machine without Slurm's commands."""
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))


@pytest.fixture
def run(tmp_path):
    config = load_config("demo", [*TINY, f"run_dir={tmp_path / 'run'}"])
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    (run.root / "config.yaml").write_text(dump_config(config), "utf-8")
    return run


def write_lines(run, *lines):
    with run.metrics.path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def train_line(step, at, **more):
    return {"time": at, "stage": "train", "step": step, "train/loss": 6.0 - step / 100, **more}


def progress_line(stage, done, total, at, rate=2.0):
    values = {"progress/done": done, "progress/total": total, "progress/unit": "rows", "progress/rate": rate}
    return {"time": at, "stage": stage, **values, "progress/eta_s": (total - done) / rate}


def test_progress_of_a_stage_is_its_newest_line(run):
    write_lines(run, progress_line("datastore write", 10, 100, 1000), progress_line("datastore write", 40, 100, 1015))
    with run.metrics.path.open("a", encoding="utf-8") as stream:
        stream.write('{"time": 1016, "stage": "data')
    found = present(read_progress(run.metrics.path))
    assert (found.stage, found.done, found.total, found.unit) == ("datastore write", 40, 100, "rows")
    assert (found.rate, found.left_s, found.time) == (2.0, 30.0, 1015)


def test_progress_of_training_comes_from_its_steps(run):
    write_lines(
        run, progress_line("train", 1, 400, 999), *(train_line(step, 1000 + step / 4) for step in range(2, 102))
    )
    found = present(read_progress(run.metrics.path))
    assert (found.stage, found.done, found.total) == ("train", 101, 400)
    assert found.rate == pytest.approx(4)
    assert found.left_s == pytest.approx(299 / 4)
    assert found.values["train/loss"] == pytest.approx(4.99)


def test_the_rate_after_a_restart_is_that_of_the_new_start(run):
    before = [train_line(step, 1000 + step) for step in range(1, 11)]
    after = [train_line(step, 5000 + step / 2) for step in range(8, 12)]
    write_lines(run, *before, *after)
    found = present(read_progress(run.metrics.path))
    assert (found.done, found.total, found.left_s) == (11, None, None)
    assert found.rate == pytest.approx(2)


def test_what_the_runtime_writes_is_what_status_reads(run):
    with record_progress(MetricsFile(run.metrics.path)), Counter("index add", 8, "keys") as counter:
        counter.advance(3)
    found = present(read_progress(run.metrics.path))
    assert (found.stage, found.done, found.total, found.unit) == ("index add", 3, 8, "keys")


def test_status_from_files_alone(run, monkeypatch):
    now = time.time()
    write_lines(run, progress_line("train", 100, 400, now - 10), train_line(101, now - 5))
    record_job(run, "train", "4242", "sbatch", "node[1-2]")
    found = status_of(run)
    assert found.stages["train"] is False
    assert [(job.job, job.stage, job.state) for job in found.jobs] == [("4242", "train", "UNKNOWN")]
    text = as_text(found, now)
    assert "job 4242" in text
    assert "train: 101/400 updates (25%)" in text
    assert "(last line 5s ago)" in text
    assert "STALE" not in text


def test_a_running_job_that_writes_nothing_is_stale(run, monkeypatch):
    now = time.time()
    write_lines(run, train_line(101, now - 1000))
    record_job(run, "train", "4242", "sbatch", "node1")
    for elapsed, stale in (("30:00", True), ("2:00", False)):
        shown = slurm.Job("4242", "RUNNING", elapsed, "UNLIMITED", "node1")
        monkeypatch.setattr(slurm, "jobs", lambda ids, shown=shown: {"4242": [shown]})
        found = status_of(run, stale_after_s=300)
        assert (found.stale_s is not None) == stale
        assert ("STALE" in as_text(found, now)) == stale


def test_a_silent_slurm_leaves_what_the_run_directory_knows(run, monkeypatch):
    def silent(_ids):
        raise slurm.SlurmSilent("squeue: no answer from Slurm within 30 s")

    now = time.time()
    write_lines(run, progress_line("train", 100, 400, now - 10))
    record_job(run, "train", "42", "submitit", "2", name="train", log=str(run.root / "none" / "42_0_log.out"))
    record_job(run, "datastore", "43", "submitit", "2", name="datastore", cancelled=True)
    attempt = RestartLine(time=now - 100, job="42", restarts=0, owner="task", mark="no checkpoint")
    make(attempts(run, "train"), attempt.line() + "\n")
    monkeypatch.setattr(slurm, "jobs", silent)
    found = status_of(run)
    assert [(job.state, job.reason) for job in found.jobs] == [
        ("UNKNOWN", "last known: submitted 0s ago"), ("UNKNOWN", "last known: cancelled by `distlm cancel`"),
    ]  # fmt: skip
    make(run.root / ".alive" / "x" / "rank-00000.json", "{}")
    os.utime(run.root / ".alive" / "x" / "rank-00000.json", (now + 60, now + 60))
    assert "ranks of this run gave a sign of life" in status_of(run).jobs[0].reason
    text = as_text(found, now)
    assert "SLURM     did not answer" in text and "no answer from Slurm within 30 s" in text
    assert "train: 100/400 rows (25%)" in text


def test_what_slurm_ended_is_named_with_the_command_that_brings_it_back(run, monkeypatch):
    record_job(run, "train", "42", "submitit", "2", name="train")
    for state, named in (("PREEMPTED", True), ("TIMEOUT", True), ("FAILED", False), ("COMPLETED", False)):
        monkeypatch.setattr(slurm, "jobs", lambda ids, state=state: {"42": [slurm.Job("42", state)]})
        text = as_text(status_of(run), time.time())
        assert (f"distlm requeue {run.root}" in text) == named, text


def test_slurms_times():
    assert [_seconds(text) for text in ("0:07", "12:34", "1:02:03", "2-01:00:00", "INVALID")] == [
        7, 754, 3723, 176400, 0,
    ]  # fmt: skip


def test_a_job_that_records_itself_at_every_start_counts_once(run):
    for _ in range(3):
        record_job(run, "train", "7", "sbatch", "node1")
    record_job(run, "datastore", "8", "sbatch", "node1", log="/somewhere/8_0.log")
    with (run.root / "launch" / "jobs.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"time": 1, "st')
    assert [(each.job, each.stage) for each in submissions(run)] == [("7", "train"), ("8", "datastore")]


def test_the_tasks_of_an_array_are_one_job(run, monkeypatch):
    def starts(task):
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        with pytest.raises(SystemExit) as end:
            jobs.main(["datastore", str(run.root)])
        return end.value.code

    assert [starts(0), starts(3)] == [0, 0]
    (found,) = submissions(run)
    assert (found.job, found.stage) == ("12", "datastore")

    def silent(_ids):
        raise slurm.SlurmSilent("squeue: no answer from Slurm within 30 s")

    monkeypatch.setattr(slurm, "jobs", silent)
    attempt = RestartLine(time=time.time() + 9, job="12_3", restarts=0, owner="batch script", mark="nothing")
    make(attempts(run, "datastore"), attempt.line() + "\n")
    assert "asked to start again" in status_of(run).jobs[0].reason
    jobs.note(run, found, cancelled=True)
    assert [starts(3), starts(7)] == [75, 75], "one that had not started when it was cancelled"


def test_lines_without_a_format_are_read_and_a_mistyped_one_is_named(run):
    record_job(run, "train", "", "deepspeed", "a,b", host="a", pid=7, logs="/somewhere")
    path = run.root / "launch" / "jobs.jsonl"
    line = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({name: value for name, value in line.items() if name != "format"}) + "\n", "utf-8")
    (found,) = submissions(run)
    assert (found.log, found.host, found.pid) == ("/somewhere", "a", 7)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line | {"pid": "seven"}) + "\n")
    with pytest.raises(DistlmError, match=r"jobs\.jsonl:2: not a valid record of submitted jobs: .* at `\$\.pid`"):
        submissions(run)


def make(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def test_logs_of_a_job_are_found_by_its_id(run):
    logs = run.root / "launch" / "submitit" / "x"
    for name in ("12_0_log.out", "12_1_log.out", "12_10_log.out", "112_0_log.out", "120_0_log.out", "12_0_result.pkl"):
        make(logs / name, name)
    found = find_logs(run, Submission(0, "train", "12", "submitit", ""))
    assert [(log.path.name, log.rank) for log in found] == [
        ("12_0_log.out", 0), ("12_1_log.out", 1), ("12_10_log.out", 10),
    ]  # fmt: skip


def test_logs_of_scripts_and_arrays(run):
    names = ["distlm-train-12.out", "distlm-train-12_0.log", "distlm-train-12_1.log"]
    names += [
        "distlm-datastore-array-13_0.out",
        "distlm-datastore-array-13_0_0.log",
        "distlm-datastore-array-13_1_0.log",
    ]
    for name in names:
        make(run.logs / name, name)
    script = find_logs(run, Submission(0, "train", "12", "sbatch", ""))
    assert [log.rank for log in script] == [None, 0, 1]
    array = find_logs(run, Submission(0, "datastore", "13", "sbatch", ""))
    assert [(log.task, log.rank) for log in array] == [(0, None), (0, 0), (1, 0)]
    assert [log.path.name for log in of_rank(array, 0)] == names[4:]


def test_logs_of_a_deepspeed_start(run):
    folder = run.root / "launch" / "deepspeed" / "one"
    for rank in (0, 1, 10):
        make(folder / f"rank-{rank:05d}.log", f"rank {rank}")
    record_job(run, "train", "", "deepspeed", "a,b", logs=str(folder))
    assert [log.rank for log in newest_logs(run)] == [0, 1, 10]
    with pytest.raises(DistlmError, match=r"no submission of stage datastore"):
        newest_logs(run, stage="datastore")


def test_the_logs_command(run):
    folder = run.root / "launch" / "deepspeed" / "one"
    make(folder / "rank-00001.log", "".join(f"line {number}\n" for number in range(100)))
    record_job(run, "train", "", "deepspeed", "a,b", logs=str(folder))
    command = [sys.executable, "-m", "launchers.logs", str(run.root), "--rank", "1", "--lines", "2"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert done.stdout == f"==> {folder / 'rank-00001.log'} <==\nline 98\nline 99\n\n"
    command[command.index("1")] = "5"
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, "no log of rank 5; there are ranks 1 to 1" in done.stderr) == (1, True)


def test_runs_are_named_by_folder_or_recipe(run, monkeypatch):
    assert [named.root for named in named_runs([str(run.root)])] == [run.root]
    assert [named.root for named in named_runs(["demo", f"run_dir={run.root}"])] == [run.root]
    with pytest.raises(DistlmError, match="no run here yet"):
        named_runs(["demo", f"run_dir={run.root / 'other'}"])
    with pytest.raises(UsageError, match="no recipe, file or run directory 'dmo'"):
        named_runs(["dmo"])


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("demo", ["prepare", "train", "datastore", "index-train", "index-add", "index-merge", "search", "evaluate"]),
        ("plm-small", ["shard", "train", "evaluate"]),
        ("awd-lstm-small", ["prepare", "train", "evaluate"]),
    ],
)
def test_a_run_has_the_stages_of_its_recipe(recipe, stages, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(dump_config(load_config(recipe, [f"run_dir={tmp_path}"])), "utf-8")
    read = []

    def counted(*words):
        read.append(words)
        return load_config(*words)

    monkeypatch.setattr("launchers.status.load_config", counted)
    found = status_of(RunDir(tmp_path))
    assert len(read) == 1, "the configuration is read once"
    assert list(found.stages) == stages and not any(found.stages.values())
    shown = as_text(found, time.time()).splitlines()[1]
    assert shown.split("stages")[1].split(", ") == [
        f"    {stages[0]} not yet",
        *(f"{name} not yet" for name in stages[1:]),
    ]


def test_a_run_is_named_by_the_words_of_the_command_that_was_submitted(run, tmp_path, monkeypatch):
    assert [named.root for named in named_runs([str(run.root), "train.updates=400"])] == [run.root]
    with pytest.raises(UsageError, match=r"train\.updtes"):
        named_runs([str(run.root), "train.updtes=400"])
    other = shutil.copytree(run.root, tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert [named.root for named in named_runs([str(run.root), "./demo"])] == [run.root, other.relative_to(tmp_path)]
    with pytest.raises(DistlmError, match="runs/demo: no run here yet"):
        named_runs(["demo"])


@pytest.mark.parametrize(("module", "error"), [("requeue", "no job to requeue"), ("cancel", "no job waits or runs")])
def test_without_jobs_there_is_nothing_to_do(run, module, error):
    command = [sys.executable, "-m", f"launchers.{module}", str(run.root)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert error in done.stdout + done.stderr
    assert done.returncode == (1 if module == "requeue" else 0)


def test_no_slurm_is_said_when_slurm_is_needed():
    assert os.environ["PATH"].endswith("bin")
    with pytest.raises(DistlmError, match="scancel: not found, so there is no Slurm on this machine"):
        slurm.cancel(["1"])


@pytest.mark.parametrize(
    ("code", "said", "error"),
    [
        (1, "scancel: error: Kill job error on job id 1: Invalid job id specified", None),
        (1, "scancel: error: Kill job error on job id 1: Job/step already completing or completed", None),
        (1, "scancel: error: Kill job error on job id 1: Access/permission denied", "scancel 1: .*permission denied"),
        (1, "", "scancel 1: exit code 1"),
        (0, "a warning", None),
    ],
)
def test_cancelling_what_has_ended_meanwhile_is_no_error(tmp_path, monkeypatch, code, said, error):
    (tmp_path / "scancel").write_text(f"#!/bin/sh\necho '{said}' | grep . >&2\nexit {code}\n", "utf-8")
    (tmp_path / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DistlmError, match=error) if error else nullcontext():
        slurm.cancel(["1"])
