"""Wrong set-ups on a real Slurm: each ends by itself with one clear error; none waits for its time limit."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.shims import shim
from support.slurm import ON_TWO, long_training, script, wait_for_updates
from support.slurm.cluster import Slurm
from support.train import tiny_tokens

Submit = Callable[[Slurm, Path], str]


def two_tasks_for_four_ranks(slurm: Slurm, tokens: Path) -> str:
    return slurm.sbatch(*ON_TWO, script("train"), *long_training(slurm.folder / "four", tokens), DISTLM_RANKS="4")


def srun_forgotten(slurm: Slurm, tokens: Path) -> str:
    words = " ".join(long_training(slurm.folder / "body", tokens))
    return slurm.sbatch(*ON_TWO, "--job-name=body", "--wrap", f"python -m distlm train {words}")


def run_directory_of_each_node_its_own(slurm: Slurm, tokens: Path) -> str:
    # Every node of the test cluster has its own /dev/shm. A new name: what an earlier session left there counts.
    run = Path("/dev/shm", f"distlm-{slurm.folder.parent.name}")
    return slurm.sbatch(*ON_TWO, script("train"), *long_training(run, tokens))


def mpi_that_slurm_does_not_have(slurm: Slurm, tokens: Path) -> str:
    site = slurm.folder / "another-site.yaml"
    site.write_text("mpi: pmix_v99\n", "utf-8")
    return slurm.sbatch(*ON_TWO, script("train"), *long_training(slurm.folder / "mpi", tokens), DISTLM_SITE=str(site))


def run_directory_in_use(slurm: Slurm, tokens: Path) -> str:
    words = long_training(slurm.folder / "twice", tokens, "train.updates=100000", "train.save_every=0")
    first = slurm.sbatch(*ON_TWO, "--job-name=first", script("train"), *words)
    wait_for_updates(slurm, first, slurm.folder / "twice", 1)
    return slurm.sbatch(*ON_TWO, script("train"), *words)


def run_directory_in_use_without_locks(slurm: Slurm, tokens: Path) -> str:
    """On a file system without flock, as Lustre may be mounted: other nodes, and nothing but signs of life."""
    words = long_training(slurm.folder / "unlocked", tokens, "train.updates=100000", "train.save_every=0")
    without = shim(no_flock=True)
    first = slurm.sbatch(*ON_TWO, "--job-name=unlocked", script("train"), *words, **without)
    wait_for_updates(slurm, first, slurm.folder / "unlocked", 1)
    return slurm.sbatch(*ON_TWO, script("train"), *words, **without)


def no_such_recipe(slurm: Slurm, _tokens: Path) -> str:
    return slurm.sbatch(*ON_TWO, script("run"), "demmo")


WRONG: dict[Submit, str] = {
    two_tasks_for_four_ranks: r"distlm: world mismatch: 4 ranks were asked for \(DISTLM_RANKS\).* rank \d of 2 ",
    srun_forgotten: r"distlm: one process in the script body of Slurm job {job}, which has 2 tasks: .*srun",
    run_directory_of_each_node_its_own: r"distlm: run_dir=/dev/shm/distlm-.*: not shared, .*node\d.* on node\d",
    mpi_that_slurm_does_not_have: r"srun: error: .*pmix_v99",
    run_directory_in_use: r"another run is training here \(Slurm job {first}, pid \d+ on node\d since ",
    run_directory_in_use_without_locks: r"another run is training here \(Slurm job {first}, pid \d+ on node\d since ",
    no_such_recipe: r"launchers.pending: .*demmo",
}
"""How each is submitted, and what it must say."""


@pytest.fixture(scope="module")
def jobs(module_slurm: Slurm) -> dict[Submit, str]:
    """All of them at once."""
    tokens = tiny_tokens(module_slurm.folder)
    return {submit: submit(module_slurm, tokens) for submit in WRONG}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_one_clear_error_and_an_end(module_slurm: Slurm, jobs: dict[Submit, str], wrong: Submit) -> None:
    if wrong is run_directory_of_each_node_its_own and module_slurm.cluster.mode == "plain":
        pytest.skip("the nodes share /dev/shm: cluster.sh found no namespaces (mode plain)")
    job = jobs[wrong]
    assert module_slurm.wait(job) == "FAILED"
    said = module_slurm.output(job)
    first = module_slurm.jobs[module_slurm.jobs.index(job) - 1]
    assert re.search(WRONG[wrong].format(job=job, first=first), said), said
    assert "Traceback" not in said
    assert module_slurm.restarts(job) == 0, "an error is not requeued"
    print(f"{wrong.__name__}: ended after {module_slurm.show(job)['RunTime']}")
