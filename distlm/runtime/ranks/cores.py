"""CPU cores of this process, and of one rank among those of its node."""

import os
from collections.abc import Mapping

from distlm.runtime.ranks.world import World


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_of_cores(processes: int) -> int:
    """Cores of this process for each of some that share them, at least one."""
    return max(1, usable_cores() // max(processes, 1))


def rank_cores(world: World, env: Mapping[str, str] | None = None) -> int:
    """Cores for this rank: what Slurm gives a task; else those it may run on, or its share of them.

    Ranks that are bound have cores of their own, and there are enough for all; else they share what each sees.
    """
    env = os.environ if env is None else env
    if world.source == "slurm" and env.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return max(1, int(env["SLURM_CPUS_PER_TASK"]))
    bound = usable_cores() * world.local_size <= (os.cpu_count() or 1)
    return share_of_cores(1 if bound else world.local_size)
