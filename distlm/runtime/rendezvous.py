"""The variables torch.distributed and DeepSpeed need, derived from the World where the launcher sets none."""

import os
import re
import subprocess

from distlm.errors import DistlmError
from distlm.runtime.world import World


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
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return shown.stdout.split()[0]
    raise DistlmError(f"{world}: MASTER_ADDR is not set and there is no Slurm to ask; export MASTER_ADDR=<first node>")


def _master_port() -> int:
    """A port below the ephemeral range (32768 and up), different for each job of a node."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("PMIX_NAMESPACE") or str(os.getppid())
    digits = re.sub(r"\D", "", job.partition("@")[0]) or "0"
    return 20000 + int(digits) % 10000
