"""A node that loses its network, clocks apart, no locks: on a real Slurm."""

import json
import sys
from pathlib import Path

import pytest
from support.deadline import until
from support.shims import shim
from support.slurm import ON_TWO, logged, long_training, rank_process, script, wait_for_updates
from support.slurm.cluster import Slurm
from support.train import same_end, tiny_tokens


@pytest.mark.slow
def test_a_start_waits_for_the_one_that_its_job_left_on_a_cut_off_node(slurm: Slurm) -> None:
    """Rank 0 and the batch script go on where Slurm cannot reach them, and hold the run; Slurm starts the job anew."""
    tokens = tiny_tokens(slurm.folder)
    whole, run = slurm.folder / "whole", slurm.folder / "cut"
    # Longer than Slurm takes to miss the node and start the job anew: 20 s, and 120 s that a requeued job waits.
    words = long_training(run, tokens, "launch.lost_after_s=180")
    job = slurm.sbatch(*ON_TWO, "--nodelist=node[1-2]", script("train"), *words)
    undisturbed = slurm.sbatch(*ON_TWO, "--nodelist=node[3-4]", script("train"), *long_training(whole, tokens))
    wait_for_updates(slurm, job, run, 5)
    node, _ = rank_process(run, 0)
    assert node == "node1"
    slurm.cut(node)
    slurm.done(undisturbed)
    until(lambda: slurm.restarts(job), lambda: f"a requeue\n{slurm.output(job)}", pause=0.2)
    # Only now: the requeued job must not be put on that node again.
    slurm.run("scontrol", "update", f"jobid={job}", "reqnodelist=node[3-4]", check=False)
    slurm.done(job)
    said = slurm.output(job)
    assert f"start 1 of this same job is training here (Slurm job {job}, pid " in said, said
    assert "another run is training here" not in said
    assert same_end(whole, run) and logged(whole) == logged(run)


def test_the_doctor_names_clocks_that_are_apart_and_missing_locks(slurm: Slurm, tmp_path: Path) -> None:
    words = ["-m", "distlm", "doctor", "--cluster", "--json", "--folder", tmp_path]
    done = slurm.run(
        "srun", "-N2", "--nodelist=node[1-2]", "--ntasks-per-node=1", "--mem=200", "--cpus-per-task=2", sys.executable,
        *words, check=False, **shim(no_flock=True, clock=200_000, node="node2"),
    )  # fmt: skip
    found = {check["name"]: (check["status"], check["text"]) for check in json.loads(done.stdout)["checks"]}
    status, text = found["clocks"]
    assert status == "warn" and text.startswith("20") and "s apart at most (node2 is ahead)" in text, found
    assert f"{tmp_path} stamps files 2000" in text and "behind a node's clock" in text
    assert found["folder"][0] == "ok"
    assert found["locks"] == ("warn", found["locks"][1]) and found["locks"][1].startswith("no flock on node2: a run's")
