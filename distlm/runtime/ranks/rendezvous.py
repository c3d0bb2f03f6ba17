"""Joining the ranks in torch.distributed: its variables, derived from the World where the launcher sets none."""

import os
import re
from datetime import timedelta

from distlm.errors import DistlmError
from distlm.runtime.ranks.nodelist import expand_nodes
from distlm.runtime.ranks.world import World

JOIN_WITHIN = timedelta(seconds=180)
"""Ranks of one start come up within this time, or something is wrong."""

WAIT = timedelta(days=7)
"""How long a collective waits. One rank may work for hours while the others wait for it, and torch's 30 minutes (NCCL:
10) would end them all; that a rank is dead the others learn from its signs of life (distlm.runtime.alive)."""


def join_group(world: World) -> None:
    """Make the torch.distributed group unless there is one: gloo, and NCCL beside it where there is CUDA. Collective.

    Works under every launcher, because the rendezvous comes from the World. Raises DistlmError when the master's port
    is taken or the master cannot be reached.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if world.size == 1:
        # No port is opened, so any number of single runs share a machine.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=WAIT)
        return
    export_rendezvous(world)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's agent listens there already.
            dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=WAIT)
            return
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world.size, world.rank == 0, JOIN_WITHIN
        )
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=WAIT)
    except dist.DistError as error:
        text = str(error)
        if "EADDRINUSE" in text or "already in use" in text:
            raise DistlmError(
                f"MASTER_PORT={os.environ['MASTER_PORT']} on {world.node} is taken by another program; export "
                "MASTER_PORT=<a free port from 20000 to 32767> and start again"
            ) from error
        raise DistlmError(
            f"{world} cannot join the others at MASTER_ADDR:MASTER_PORT={place} within "
            f"{JOIN_WITHIN.total_seconds():.0f} s ({text.strip().splitlines()[0]}); is rank 0 up (see its log), and is "
            "the address one that all nodes reach?"
        ) from error


def export_rendezvous(world: World) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, keeping those that are set.

    Raises DistlmError when no master address can be derived (several nodes and no Slurm).
    """
    values = {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
    }
    if "MASTER_ADDR" not in os.environ:
        values["MASTER_ADDR"] = _master_address(world)
    if "MASTER_PORT" not in os.environ:
        values["MASTER_PORT"] = str(_master_port())
    os.environ.update(values)
    if values.get("MASTER_ADDR") == "127.0.0.1":
        # gloo resolves the host name to choose an interface, which fails on machines whose name resolves nowhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _master_address(world: World) -> str:
    if world.local_size == world.size:
        return "127.0.0.1"
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if nodes:
        return expand_nodes(nodes)[0]
    raise DistlmError(f"{world}: MASTER_ADDR is not set and there is no Slurm to ask; export MASTER_ADDR=<first node>")


def _master_port() -> int:
    """A port below the ephemeral range (32768 and up), different for each job of a node."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("PMIX_NAMESPACE") or str(os.getppid())
    digits = re.sub(r"\D", "", job.partition("@")[0]) or "0"
    # Steps of one job may run at once.
    step = os.environ.get("SLURM_STEP_ID", "0") if os.environ.get("SLURM_JOB_ID") else "0"
    return 20000 + (16 * int(digits) + int(step if step.isdigit() else 0)) % 10000
