"""Node lists as scontrol expands them; status, logs, cancel and requeue of real jobs."""

import json
import sys

import pytest
from support import TINY
from support.deadline import until

from distlm.config.load import dump_config, load_config
from distlm.runtime.rundir import RunDir
from launchers.hosts.nodes import expand_nodes
from launchers.jobs import was_cancelled

BODY = """#!/bin/bash
python -m launchers.jobs train --log "$PWD/logs/$SLURM_JOB_ID"_0.log config.yaml
srun --output=logs/%j_%t.log --open-mode=append bash -c 'echo "hello of $SLURM_PROCID"
trap "echo asked to stop; exit 75" USR1
while :; do sleep 0.1; done'
[ $? = 75 ] && scontrol requeue "$SLURM_JOB_ID"
sleep 20
"""
"""A job that records itself and works until it is asked to stop."""


@pytest.fixture
def run(slurm):
    folder = slurm.folder / "run"
    (folder / "logs").mkdir(parents=True)
    config = load_config("demo", [*TINY, f"run_dir={folder}"])
    (folder / "config.yaml").write_text(dump_config(config), "utf-8")
    (folder / "job.sh").write_text(BODY, "utf-8")
    return folder


def submit(slurm, run, *flags):
    return slurm.sbatch("--chdir", run, "--output", run / "logs" / "job-%j.out", *flags, run / "job.sh")


def tool(slurm, name, *words, check=True, **env):
    return slurm.run(sys.executable, "-m", f"launchers.{name}", *words, check=check, **env)


def status(slurm, run, **env):
    return json.loads(tool(slurm, "status", run, "--json", **env).stdout)[0]


def test_node_lists_are_what_scontrol_says(slurm):
    for text in (
        "node1", "node[1-4]", "rack[0-1]node[2-3]", "n[5],m[1-2]", "n[008-011]", "b2,a1,b[1,10]",
        "n[9-11],x-y[01]", "c[09-10,7]",
    ):  # fmt: skip
        assert expand_nodes(text) == slurm.run("scontrol", "show", "hostnames", text).stdout.split(), text


def test_a_running_job_its_logs_requeue_and_cancel(slurm, run):
    job = submit(slurm, run, "-N2", "--ntasks-per-node=1", "-t", "120")
    log = run / "logs" / f"{job}_1.log"
    slurm.until_in(job, lambda: log.exists() and "hello" in log.read_text("utf-8"), "hello")
    (run / "metrics.jsonl").write_text('{"time": 5, "stage": "train", "step": 2, "train/loss": 3.5}\n', "utf-8")
    found = status(slurm, run)
    (about,) = found["jobs"]
    assert (about["job"], about["stage"], about["state"], about["nodes"]) == (job, "train", "RUNNING", about["nodes"])
    assert len(expand_nodes(about["nodes"])) == 2
    assert (about["owner"], about["restarts"]) == ("sbatch", 0)
    assert (found["progress"]["stage"], found["progress"]["done"], found["stale_s"]) == ("train", 2, None)
    assert found["follow"] == f"tail -F {run}/logs/{job}_0.log"
    text = tool(slurm, "status", run).stdout
    assert f"job {job}" in text
    assert "train RUNNING" in text
    shown = tool(slurm, "logs", run, "--rank", "1").stdout
    assert shown.startswith(f"==> {log} <==\n")
    assert shown.endswith("hello of 1\n\n")
    # The record is an hour old as far as the job is concerned.
    assert "STALE" in tool(slurm, "status", run, "--stale-after", "0").stdout

    said = tool(slurm, "requeue", run).stdout
    assert f"job {job} (train): asked to stop after a checkpoint; sbatch requeues it" in said
    until(lambda: slurm.restarts(job) == 1, "the requeue by the job's own script", pause=0.1)
    assert "asked to stop" in log.read_text("utf-8")
    assert status(slurm, run)["jobs"][0]["restarts"] == 1

    assert f"cancelled {job}" in tool(slurm, "cancel", run).stdout
    slurm.wait(job, ["CANCELLED"])
    assert status(slurm, run)["jobs"][0]["state"] == "CANCELLED"
    assert "no job waits or runs" in tool(slurm, "cancel", run).stdout


def test_a_held_job_is_released_and_an_array_is_one_job(slurm, run):
    job = submit(slurm, run, "-N1", "--hold")
    array = submit(slurm, run, "-N1", "--hold", "--array=0-2", "--begin=now+1hour")
    lines = [{"time": 1, "stage": stage, "job": each, "owner": "sbatch", "nodes": ""}
             for stage, each in (("train", job), ("datastore", array))]  # fmt: skip
    (run / "launch").mkdir()
    (run / "launch" / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    train, datastore = status(slurm, run)["jobs"]
    assert (train["state"], datastore["state"]) == ("PENDING", "3 PENDING")
    assert f"job {job} (train): released, was held" in tool(slurm, "requeue", run, "--stage", "train").stdout
    slurm.wait(job, ["RUNNING"])
    assert f"job {job} (train): requeued, was RUNNING" in tool(slurm, "requeue", run, "--stage=train", "--now").stdout
    for said in ("released, was held", "waits already (BeginTime)"):

        def told(text=said):
            return text in tool(slurm, "requeue", run, "--stage=datastore").stdout

        until(told, said)
    tool(slurm, "cancel", run)
    slurm.wait(job, ["CANCELLED"])
    assert set(slurm.states(array)) == {"CANCELLED"}


def test_the_tasks_of_a_scripts_array_are_one_job_to_cancel_and_to_requeue(slurm, run):
    """Those that have not started, too, and what waits for the whole array. Two may run at once."""
    array = submit(slurm, run, "-N1", "--array=0-4%2", "-t", "120")
    after = slurm.sbatch("-N1", f"--dependency=afterok:{array}", "--wrap", "true")
    record = run / "launch" / "jobs.jsonl"
    slurm.until_in(array, lambda: record.exists() and len(record.read_text("utf-8").splitlines()) == 2, "two starts")
    assert {json.loads(line)["job"] for line in record.read_text("utf-8").splitlines()} == {array}
    assert status(slurm, run)["jobs"][0]["state"] == "RUNNING (3 PENDING, 2 RUNNING)"
    assert tool(slurm, "cancel", run).stdout == f"{run}: cancelled {array}\n"
    slurm.wait(array, ["CANCELLED"])
    assert was_cancelled(RunDir(run), f"{array}_4")

    def reason() -> str:
        return slurm.show(after)["Reason"]

    until(lambda: reason() == "DependencyNeverSatisfied", "the job after the array to be given up", pause=0.1)
    said = tool(slurm, "requeue", run).stdout
    assert [f"job {array}_{task} (train): requeued, was CANCELLED" in said for task in range(5)] == [True] * 5
    assert said.endswith(f"job {after}: waits for it again\n")
    until(lambda: reason() == "Dependency", "the job after the array to wait for it again", pause=0.1)
    assert not was_cancelled(RunDir(run), f"{array}_4")
    assert set(slurm.states(array)) <= {"PENDING", "RUNNING", "CONFIGURING"}


def test_what_squeue_has_forgotten_is_asked_of_sacct(slurm, run):
    """squeue forgets an ended job after MinJobAge; then accounting tells, and where there is none, nobody does."""
    job = slurm.sbatch("-N1", "--output", run / "logs" / "job-%j.out", "--wrap", "exit 3")
    assert slurm.wait(job) == "FAILED"
    (run / "launch").mkdir()
    line = {"time": 1, "stage": "train", "job": job, "owner": "sbatch", "nodes": ""}
    (run / "launch" / "jobs.jsonl").write_text(json.dumps(line) + "\n", "utf-8")
    forgetful = run / "bin"
    forgetful.mkdir()

    def shadow(name, body):
        (forgetful / name).write_text(f"#!/bin/sh\n{body}\n", "utf-8")
        (forgetful / name).chmod(0o755)

    shadow("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    path = f"{forgetful}:{slurm.env['PATH']}"
    if slurm.run("sacct", check=False).returncode == 0:
        # The database hears of a job's end a moment later.
        until(lambda: status(slurm, run, PATH=path)["jobs"][0]["state"] == "FAILED", "sacct", pause=0.5)
    shadow("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert status(slurm, run, PATH=path)["jobs"][0]["state"] == "UNKNOWN"
