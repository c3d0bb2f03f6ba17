"""The World from recorded environments of each launcher."""

import pytest

from distlm.errors import DistlmError
from distlm.runtime.ranks.world import refuse_script_body, resolve_world

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
DEEPSPEED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM_STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
SUBMITIT = {
    "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_LOCALID": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, ("torch", 1, 4, 1, 2)),
        (DEEPSPEED, ("torch", 1, 2, 1, 2)),
        (OPENMPI, ("mpi", 2, 3, 2, 3)),
        (MPICH, ("mpi", 1, 2, 1, 2)),
        (SLURM_STEP, ("slurm", 3, 4, 1, 2)),
        (SUBMITIT, ("submitit", 1, 2, 1, 2)),
        ({}, ("single", 0, 1, 0, 1)),
        # A shell inside an allocation, and the body of a batch script, are no ranks.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, ("single", 0, 1, 0, 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, ("single", 0, 1, 0, 1)),
        # A launcher inside a Slurm step: the step's tasks are the launcher's daemons.
        ({**SLURM_STEP, **TORCHRUN}, ("torch", 1, 4, 1, 2)),
        ({**SLURM_STEP, **OPENMPI}, ("mpi", 2, 3, 2, 3)),
        # Hydra, too, starts its daemons by srun; the ranks inherit the variables of the daemon's task.
        ({**SLURM_STEP, **MPICH, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, ("mpi", 1, 2, 1, 2)),
        ({**SLURM_STEP, **MPICH, "SLURM_PROCID": "0"}, ("mpi", 1, 2, 1, 2)),
        # Slurm's pmi2 says nothing of nodes.
        ({**SLURM_STEP, "PMI_RANK": "3", "PMI_SIZE": "4"}, ("slurm", 3, 4, 1, 2)),
    ],
)
def test_world_of_each_launcher(environment, expected):
    world = resolve_world(environment)
    assert (world.source, world.rank, world.size, world.local_rank, world.local_size) == expected


def test_disagreeing_sources_are_an_error_that_names_both():
    by_hand = {"RANK": "0", "WORLD_SIZE": "1"}
    with pytest.raises(DistlmError, match=r"torch says rank 0 of 1, slurm says rank 3 of 4"):
        resolve_world({**SLURM_STEP, **by_hand})


@pytest.mark.parametrize("bad", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "one", "WORLD_SIZE": "4"}])
def test_impossible_ranks_are_refused(bad):
    with pytest.raises(DistlmError, match="world from torch"):
        resolve_world(bad)


def test_uneven_tasks_per_node():
    environment = {**SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE": "3(x1),1", "SLURM_NODEID": "1"}
    assert resolve_world(environment).local_size == 1


BODY = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


def test_the_ranks_asked_for_are_what_there_is() -> None:
    assert resolve_world({**SLURM_STEP, "DISTLM_RANKS": "4"}).size == 4
    assert resolve_world({**BODY, "DISTLM_RANKS": "1"}).size == 1
    with pytest.raises(DistlmError, match=r"8 ranks were asked for \(DISTLM_RANKS\), .* rank 3 of 4 .*srun as many"):
        resolve_world({**SLURM_STEP, "DISTLM_RANKS": "8"})
    with pytest.raises(DistlmError, match=r"4 ranks were asked for .* rank 0 of 1 .*srun is missing"):
        resolve_world({**BODY, "DISTLM_RANKS": "4"})
    with pytest.raises(DistlmError, match=r"2 ranks were asked for .*from torch.*start as many"):
        resolve_world({**TORCHRUN, "DISTLM_RANKS": "2"})


def test_one_process_in_a_script_body_of_several_tasks_is_refused() -> None:
    with pytest.raises(DistlmError, match=r"script body of Slurm job 7, which has 4 tasks: .*`srun distlm"):
        refuse_script_body(resolve_world(BODY), BODY)
    for fine in ({**BODY, "DISTLM_RANKS": "1"}, {**BODY, "SLURM_NTASKS": "1"}, SLURM_STEP, {}):
        refuse_script_body(resolve_world(fine), fine)
