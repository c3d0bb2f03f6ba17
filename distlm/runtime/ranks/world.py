"""Rank, size and place of this process, resolved once from a visible list of probes."""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distlm.errors import DistlmError


@dataclass(frozen=True, slots=True)
class World:
    """This process among its peers.

    `source` names the probe that answered (torch, submitit, slurm, mpi or single); every error shows it.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    node: str
    source: str

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} on {self.node} (from {self.source})"


ALONE = World(rank=0, size=1, local_rank=0, local_size=1, node=socket.gethostname(), source="single")
"""A process that is no rank, whatever the environment says."""

Environ = Mapping[str, str]

ASKED = "DISTLM_RANKS"
"""Variable with the number of ranks that whoever started them wants; scripts and launchers set it."""


def from_torch(env: Environ) -> World | None:
    """torchrun, the deepspeed launcher, or RANK and WORLD_SIZE set by hand."""
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    # The deepspeed launcher sets LOCAL_SIZE and no LOCAL_WORLD_SIZE.
    local_size = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))
    return _world(env["RANK"], env["WORLD_SIZE"], env.get("LOCAL_RANK", env["RANK"]), local_size, "torch")


def from_submitit(env: Environ) -> World | None:
    """submitit's local executor; on Slurm its tasks are a Slurm step."""
    if env.get("SUBMITIT_EXECUTOR") != "local":
        return None
    rank, size = env["SUBMITIT_LOCAL_GLOBALID"], env["SUBMITIT_LOCAL_NTASKS"]
    return _world(rank, size, env.get("SUBMITIT_LOCAL_LOCALID", rank), size, "submitit")


def from_slurm_step(env: Environ) -> World | None:
    """A task that srun started. The job alone (salloc shell, sbatch body) is no step and has no ranks."""
    if "SLURM_PROCID" not in env or "SLURM_STEP_NUM_TASKS" not in env:
        return None
    size = env["SLURM_STEP_NUM_TASKS"]
    local_size = _tasks_on_this_node(env.get("SLURM_STEP_TASKS_PER_NODE", size), int(env.get("SLURM_NODEID", "0")))
    return _world(env["SLURM_PROCID"], size, env.get("SLURM_LOCALID", "0"), str(local_size), "slurm")


def from_mpi(env: Environ) -> World | None:
    """mpirun or mpiexec of Open MPI or MPICH."""
    if "OMPI_COMM_WORLD_RANK" in env:
        return _world(
            env["OMPI_COMM_WORLD_RANK"], env["OMPI_COMM_WORLD_SIZE"],
            env["OMPI_COMM_WORLD_LOCAL_RANK"], env["OMPI_COMM_WORLD_LOCAL_SIZE"], "mpi",
        )  # fmt: skip
    # Under srun --mpi=pmi2 nothing says which ranks share a node but Slurm's own variables.
    if "PMI_RANK" in env and "PMI_SIZE" in env and ("MPI_LOCALNRANKS" in env or "SLURM_STEP_NUM_TASKS" not in env):
        rank, size = env["PMI_RANK"], env["PMI_SIZE"]
        return _world(rank, size, env.get("MPI_LOCALRANKID", rank), env.get("MPI_LOCALNRANKS", size), "mpi")
    return None


def single(_env: Environ) -> World:
    """No launcher: one process."""
    return World(0, 1, 0, 1, socket.gethostname(), "single")


PROBES: tuple[Callable[[Environ], World | None], ...] = (from_torch, from_submitit, from_mpi, from_slurm_step)
"""In order of precedence: an inner launcher before the one that started it; `single` when none answers."""


def resolve_world(env: Environ | None = None) -> World:
    """The world that the first answering probe gives.

    Raises DistlmError when the size is not what DISTLM_RANKS asks for, and when two launchers disagree on rank or
    size, unless one of them started the other (torchrun or mpirun inside a Slurm step: the step's tasks are then the
    launcher's daemons).
    """
    env = os.environ if env is None else env
    answers = [world for probe in PROBES if (world := probe(env)) is not None]
    world = answers[0] if answers else single(env)
    asked = env.get(ASKED)
    if asked and asked != str(world.size):
        raise DistlmError(
            f"world mismatch: {asked} ranks were asked for ({ASKED}), and this is {world}; "
            f"{_why_other_size(env, world)}"
        )
    for other in answers[1:]:
        if other.source == "slurm" and _launched_inside_step(env, world):
            continue
        if (other.rank, other.size) != (world.rank, world.size):
            raise DistlmError(
                f"world mismatch: {world.source} says rank {world.rank} of {world.size}, {other.source} says rank "
                f"{other.rank} of {other.size}; start the ranks with one launcher, or unset the variables of the other"
            )
    return world


def refuse_script_body(world: World, env: Environ | None = None) -> None:
    """DistlmError for a single process in the body of a Slurm script (or an salloc shell) whose job has several tasks:
    there `srun` was forgotten. With DISTLM_RANKS=1 one process is what was meant."""
    env = os.environ if env is None else env
    tasks = env.get("SLURM_NTASKS", "1")
    if world.source == "single" and env.get("SLURM_JOB_ID") and tasks != "1" and not env.get(ASKED):
        raise DistlmError(
            f"one process in the script body of Slurm job {env['SLURM_JOB_ID']}, which has {tasks} tasks: start the "
            f"ranks with `srun distlm ...`, or export {ASKED}=1 if one is meant"
        )


def _why_other_size(env: Environ, world: World) -> str:
    if world.source == "single" and env.get("SLURM_JOB_ID"):
        return "srun is missing before the command"
    if world.source == "slurm":
        return "give srun as many tasks as ranks (--nodes, --ntasks-per-node, --ntasks)"
    return f"start as many ranks as asked for, or unset {ASKED}"


def _launched_inside_step(env: Environ, world: World) -> bool:
    if world.source == "torch":
        return "TORCHELASTIC_RUN_ID" in env or "CROSS_SIZE" in env
    # MPICH's mpiexec (Hydra) and Open MPI's mpirun start their daemons by srun.
    return world.source == "mpi" and ("OMPI_COMM_WORLD_SIZE" in env or "MPI_LOCALNRANKS" in env)


def _world(rank: str, size: str, local_rank: str, local_size: str, source: str) -> World:
    try:
        world = World(int(rank), int(size), int(local_rank), int(local_size), socket.gethostname(), source)
    except ValueError as error:
        raise DistlmError(f"world from {source}: {error}; the launcher's variables must be numbers") from error
    if not 0 <= world.rank < world.size:
        raise DistlmError(f"world from {source}: rank {world.rank} is outside 0..{world.size - 1}; check the launcher")
    return world


def _tasks_on_this_node(tasks_per_node: str, node: int) -> int:
    """Entry `node` of Slurm's compressed list, e.g. "2(x3),1"."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[min(node, len(counts) - 1)]
