"""Training that is stopped on a real Slurm continues with the next batch and ends in the undisturbed run's bytes.

The disturbed runs are in the queue at once: the 10 s that Slurm keeps a requeued job waiting pass for all together.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.deadline import until
from support.slurm import FLAGS, ON_TWO, REQUEUED, logged, long_training, repeated, script, wait_for_updates
from support.slurm.cluster import Slurm
from support.train import newest, relative, same_end, tiny_tokens

STOPS: dict[str, Callable[[Slurm, str], object]] = {
    # what --signal=USR1@120 does before the time limit: the ranks only
    "steps": lambda slurm, job: slurm.signal(job, "USR1"),
    # what sites do that signal the batch shell only, which hands it on
    "shell": lambda slurm, job: slurm.signal(job, "TERM", "--batch"),
    # by the operator, or by Slurm for a job of higher priority
    "requeue": lambda slurm, job: slurm.run("scontrol", "requeue", job),
}
TWELVE = ("train.blocks_per_update=12", "train.updates=40")


@pytest.fixture(scope="module")
def tokens(module_slurm: Slurm) -> Path:
    return tiny_tokens(module_slurm.folder)


@pytest.fixture(scope="module")
def stopped(module_slurm: Slurm, tokens: Path) -> dict[str, tuple[str, Path]]:
    """Job and run directory of each kind of stop, and of the undisturbed run; all have ended well."""
    slurm = module_slurm
    runs = {name: slurm.folder / name for name in (*STOPS, "undisturbed")}
    jobs = {name: slurm.sbatch(*ON_TWO, script("train"), *long_training(run, tokens)) for name, run in runs.items()}
    waiting = set(STOPS)

    def all_stopped() -> bool:
        for name in sorted(waiting):
            if len(logged(runs[name])) >= 5:
                STOPS[name](slurm, jobs[name])
                waiting.remove(name)
        return not waiting

    until(all_stopped, lambda: f"5 updates of {waiting}", pause=0.02)
    for job in jobs.values():
        slurm.done(job)
    return {name: (jobs[name], runs[name]) for name in runs}


@pytest.mark.parametrize("name", STOPS)
def test_stopped_and_continued_in_the_same_bytes(
    module_slurm: Slurm, stopped: dict[str, tuple[str, Path]], name: str
) -> None:
    (job, run), (_, whole) = stopped[name], stopped["undisturbed"]
    said = module_slurm.output(job)
    assert module_slurm.restarts(job) == 1
    assert "stopped after update" in said and "continuing from" in said
    assert (REQUEUED in said) == (name != "requeue"), "Slurm itself requeues what it was told to"
    assert ("TERM received, handed on" in said) == (name != "steps")
    assert same_end(whole, run)
    assert logged(whole) == logged(run) and not repeated(run)
    assert logged(whole, "train/data_fingerprint") == logged(run, "train/data_fingerprint")


@pytest.mark.slow
def test_from_4_ranks_to_2_to_3(module_slurm: Slurm, tokens: Path) -> None:
    """Each start by its own sbatch, as where a site cancels instead of requeueing; no batch is lost or repeated."""
    slurm, whole, run = module_slurm, module_slurm.folder / "twelve", module_slurm.folder / "4-2-3"
    undisturbed = slurm.sbatch(*ON_TWO, script("train"), *long_training(whole, tokens, *TWELVE))
    for ranks, stop in ((4, True), (2, True), (3, False)):
        shape = (f"--nodes={min(ranks, 3)}", f"--ntasks={ranks}", "--ntasks-per-node=2", *FLAGS[1:], "--no-requeue")
        job = slurm.sbatch(*shape, script("train"), *long_training(run, tokens, *TWELVE))
        if not stop:
            slurm.done(job)
            break
        wait_for_updates(slurm, job, run, 5)
        slurm.signal(job, "USR1")
        assert slurm.wait(job) == "FAILED"
        said = slurm.output(job)
        assert slurm.show(job)["ExitCode"] == "75:0", said
        assert "requeue refused: submit the same command again" in said
        assert f"{ranks} ranks, start 1" in said
    assert "saved on 2 ranks" in slurm.output(job)
    slurm.done(undisturbed)
    assert relative(logged(whole), logged(run)) < 1e-6
    assert not repeated(run)
    prints = logged(run, "train/data_fingerprint")
    assert len(prints) == 40 and prints == logged(whole, "train/data_fingerprint")
    assert newest(whole).name == newest(run).name


@pytest.mark.slow
def test_the_real_time_limit(slurm: Slurm, tmp_path: Path) -> None:
    """--time=1 with a signal 30 s before: Slurm looks every 30 s, so a start trains for half a minute."""
    tokens, run = tiny_tokens(tmp_path), tmp_path / "run"
    words = long_training(run, tokens, "train.updates=100000", "train.save_every=0")
    job = slurm.sbatch(*ON_TWO, "--time=1", "--signal=USR1@30", script("train"), *words)
    until(lambda: slurm.restarts(job) == 3, lambda: f"three requeues\n{slurm.output(job)}", pause=1)
    assert slurm.output(job).count(REQUEUED) >= 3
    assert not repeated(run)
