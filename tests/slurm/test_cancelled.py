"""A job of `launchers.submit` that is cancelled while it runs saves, ends, and stays ended.

The runs are in the queue at once: by scancel, by `launchers.cancel`, and an array by scancel.
"""

from pathlib import Path

import pytest
from support.slurm import wait_for_updates
from support.slurm.cluster import Slurm
from support.slurm.submitted import jobs_of, said, submit, tool
from support.train import tiny_tokens

ENDLESS = "train.updates=100000"


@pytest.fixture(scope="module")
def cancelled(module_slurm: Slurm) -> dict[str, tuple[Path, str]]:
    """Run and cancelled job of each kind."""
    slurm = module_slurm
    tokens, runs = tiny_tokens(slurm.folder), {}
    for name in ("scancel", "launchers"):
        run = slurm.folder / name
        runs[name] = run, submit(slurm, run, tokens, "train", ENDLESS, "--nodes=2")["train"]
    for run, job in runs.values():
        wait_for_updates(slurm, job, run, 5)
    slurm.run("scancel", runs["scancel"][1])
    tool(slurm, "cancel", runs["launchers"][0])
    # Cancelled in its first seconds, in which a stop also ends with 75.
    run = slurm.folder / "array"
    job = submit(slurm, run, tokens, "datastore", "--array=2")["datastore-shares"]
    slurm.until_in(job, lambda: said(slurm, run, job).count("datastore: rank 0 of 1") == 2, "both tasks")
    slurm.run("scancel", job)
    return {**runs, "array": (run, job)}


@pytest.mark.parametrize("name", ["scancel", "launchers", "array"])
def test_it_stays_dead(module_slurm: Slurm, cancelled: dict[str, tuple[Path, str]], name: str) -> None:
    run, job = cancelled[name]
    module_slurm.wait(job)
    assert set(module_slurm.states(job)) == {"CANCELLED"}, said(module_slurm, run, job)
    assert module_slurm.restarts(job) == 0
    if name != "array":
        words = said(module_slurm, run, job)
        assert "stopped after update" in words and "stopped after a checkpoint; not requeued: cancelled" in words


def test_a_requeue_that_came_between_ends_at_once_and_the_command_lets_it_go_on(
    module_slurm: Slurm, cancelled: dict[str, tuple[Path, str]]
) -> None:
    slurm, (run, job) = module_slurm, cancelled["launchers"]
    slurm.wait(job)
    before = (run / "metrics.jsonl").read_bytes()
    # What a job does that asked Slurm, and found itself running, just before it was cancelled.
    slurm.run("scontrol", "requeue", job)
    assert slurm.wait(job) == "FAILED"
    assert f"job {job} was ended by `distlm cancel`, so this start ends at once" in said(slurm, run, job)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert f"job {job} (train): requeued, was FAILED" in tool(slurm, "requeue", run).stdout
    assert jobs_of(run)["train"] == job and slurm.states(job) == ["PENDING"]
    slurm.until_in(job, lambda: said(slurm, run, job).count("train: rank 0 of 2") == 3, "a third start that goes on")
