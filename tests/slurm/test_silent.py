"""A rank dies while slurmctld does not answer: the job asks until it does, and `status` tells what the run knows.

One job of `launchers.submit` and one of a batch script, side by side.
"""

import json
from pathlib import Path

import pytest
from support.deadline import until
from support.slurm import FLAGS, REQUEUED, logged, long_training, rank_process, script, wait_for_updates
from support.slurm.cluster import Slurm
from support.slurm.submitted import said, submit, tool
from support.train import tiny_tokens

ASKING = "asking again for 15 min"


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def silence(module_slurm: Slurm) -> tuple[dict[str, Path], dict[str, str], str, str]:
    """Runs, their jobs, and what `status` and `cancel` said in the silence; the jobs have ended well since."""
    slurm, tokens = module_slurm, tiny_tokens(module_slurm.folder)
    runs = {name: slurm.folder / name for name in ("submit", "script")}
    words = long_training(runs["script"], tokens, "train.updates=300")
    jobs = {
        "submit": submit(slurm, runs["submit"], tokens, "train", "train.updates=300", "--ranks=2", "--nodes=2")[
            "train"
        ],
        "script": slurm.sbatch("--nodes=2", *FLAGS, script("train"), *words),
    }
    for name, job in jobs.items():
        wait_for_updates(slurm, job, runs[name], 3)
    with slurm.silent():
        for run in runs.values():
            node, pid = rank_process(run, 1)
            slurm.on(node, "kill", "-KILL", pid)
        status = tool(slurm, "status", runs["submit"], "--json").stdout
        text = tool(slurm, "status", runs["submit"]).stdout
        files = {name: list(slurm.folder.rglob(f"*{job}*.out")) for name, job in jobs.items()}

        def asking() -> bool:
            return all(any(ASKING in file.read_text("utf-8") for file in named) for named in files.values())

        until(asking, lambda: f"both batch scripts to ask again: {files}", pause=0.5)
    for job in jobs.values():
        slurm.done(job)
    return runs, jobs, status, text


def test_it_asks_until_slurm_answers_and_goes_on(
    module_slurm: Slurm, silence: tuple[dict[str, Path], dict[str, str], str, str]
) -> None:
    runs, jobs, _, _ = silence
    for name, job in jobs.items():
        assert module_slurm.restarts(job) == 1, name
        assert len(logged(runs[name])) == 300
    assert REQUEUED in said(module_slurm, runs["submit"], jobs["submit"])
    assert REQUEUED in module_slurm.output(jobs["script"])


def test_status_tells_what_the_run_directory_knows(
    silence: tuple[dict[str, Path], dict[str, str], str, str],
) -> None:
    runs, jobs, shown, text = silence
    (status,) = json.loads(shown)
    assert "Socket timed out" in status["silent"] or "no answer from Slurm" in status["silent"]
    assert status["progress"]["stage"] == "train" and status["progress"]["done"] >= 3
    (job,) = status["jobs"]
    assert (job["job"], job["state"]) == (jobs["submit"], "UNKNOWN")
    assert job["reason"].startswith("last known: ranks of this run gave a sign of life")
    assert status["follow"].startswith(f"tail -F {runs['submit']}/launch/submitit/")
    assert "SLURM     did not answer, so this is what the run directory knows" in text
