"""How many threads a rank gets."""

import os

import pytest

from distlm.runtime.ranks.cores import rank_cores, usable_cores
from distlm.runtime.ranks.world import World


@pytest.mark.parametrize(
    ("source", "local", "may_run_on", "of_task", "wanted"),
    [
        ("mpi", 4, 80, None, 20),
        # Bound to ten cores each.
        ("mpi", 4, 10, None, 10),
        # A job of forty cores on a node of eighty, which its ranks share.
        ("mpi", 4, 40, None, 10),
        ("slurm", 4, 80, "10", 10),
        ("slurm", 4, 10, None, 10),
        # The variable is of the tasks that srun starts, and these are mpirun's.
        ("mpi", 8, 80, "40", 10),
        ("single", 1, 10, "10", 10),
        ("torch", 99, 80, None, 1),
    ],
)
def test_cores_of_a_rank(monkeypatch, source, local, may_run_on, of_task, wanted) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 80)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(may_run_on)))
    world = World(0, local, 0, local, "node", source)
    assert rank_cores(world, {"SLURM_CPUS_PER_TASK": of_task} if of_task else {}) == wanted


def test_affinity_counts() -> None:
    """On this machine itself."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == rank_cores(World(0, 1, 0, 1, "node", "single"), {}) == 1
    finally:
        os.sched_setaffinity(0, before)
