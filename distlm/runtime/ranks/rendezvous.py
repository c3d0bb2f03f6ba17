"""Joining the ranks in torch.distributed: its variables, derived from the World where the launcher sets none."""

import os
import re
import socket
import time
from datetime import timedelta
from typing import Any

from distlm.errors import DistlmError, UsageError
from distlm.runtime.ranks.device import group_backend
from distlm.runtime.ranks.joining import Waiting, meet
from distlm.runtime.ranks.network import is_here, network_error, of_network
from distlm.runtime.ranks.nodelist import expand_nodes
from distlm.runtime.ranks.world import World

JOIN_WITHIN = "DISTLM_JOIN_WITHIN"
"""Environment variable: seconds within which the ranks of one start come up, or something is wrong; 180 by default."""

WAIT = timedelta(days=7)
"""How long a collective waits. One rank may work for hours while the others wait for it, and torch's 30 minutes (NCCL:
10) would end them all; that a rank is dead the others learn from its signs of life (distlm.runtime.alive)."""
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_FROM = {
    "torch": "RANK and WORLD_SIZE in the environment; where no launcher has set them, `unset RANK WORLD_SIZE`",
    "slurm": "the Slurm step", "mpi": "mpirun", "submitit": "submitit",
}  # fmt: skip
"""What said how many ranks there are, by World.source."""


def join_within() -> float:
    """Seconds that ranks wait for each other at the start. Raises UsageError for what is no number above 0."""
    text = os.environ.get(JOIN_WITHIN, "180")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    # A year: torch counts in milliseconds of 64 bits.
    if not 0 < seconds <= 31_536_000:
        raise UsageError(f"{JOIN_WITHIN}={text}: must be a number of seconds above 0, e.g. 600")
    return seconds


def join_group(world: World) -> None:
    """Make the torch.distributed group unless there is one: gloo, and beside it that of the device (NCCL)
    where there is one. Collective.

    Works under every launcher, because the rendezvous comes from the World, and again and again in the store of one
    that starts ranks anew. Ranks that wait say for whom. Raises DistlmError when the master's port is taken, when the
    master cannot be reached or ranks do not come within join_within(); Unreached when they then cannot be connected.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        return
    backend = group_backend()
    if world.size == 1:
        # No port is opened, so any number of single runs share a machine.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=WAIT)
        return
    came_from = "the environment" if "MASTER_ADDR" in os.environ else "the launcher's variables"
    export_rendezvous(world)
    within_s = join_within()
    place = _Place(world, os.environ["MASTER_ADDR"], _port(os.environ["MASTER_PORT"]), came_from)
    with Waiting(world, f"waiting for {place}", place.why) as waiting:
        try:
            store = place.open_store(within_s)
            name = meet(store, world, within_s, waiting)
        except (DistlmError, dist.DistError, OSError) as error:
            raise place.refusal(error, within_s) from error
        waiting.what = f"waiting for connections to the other {world.size - 1} ranks, which were all there"
        store = dist.PrefixStore(name, store)
        try:
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=WAIT)
        except RuntimeError as error:
            if of_network(error):
                raise network_error(error, f"{world} cannot connect to the others") from error
            raise


class _Place:
    """Where the ranks of a start meet: rank 0's store, or that of the agent that started it (torchrun)."""

    def __init__(self, world: World, address: str, port: int, source: str) -> None:
        self._world, self.address, self.port, self._source = world, address, port, source
        self._agents = os.environ.get(_AGENT_STORE) == "True"
        self._reason = ""

    def __str__(self) -> str:
        owner = "the agent of the ranks (torchrun)" if self._agents else "rank 0"
        return f"{owner} at MASTER_ADDR:MASTER_PORT={self.address}:{self.port} (from {self._source})"

    def open_store(self, within_s: float) -> Any:
        """The store, made or reached. Raises OSError when it is not reached in time, and what torch raises."""
        import torch.distributed as dist

        wait = timedelta(seconds=within_s)
        if self._world.rank == 0 and not self._agents:
            # By its own address: MASTER_ADDR may be one that this machine does not have, which the ranks are told then.
            return dist.TCPStore("127.0.0.1", self.port, None, True, wait, wait_for_workers=False)
        self._await_port(time.monotonic() + within_s)
        return dist.TCPStore(self.address, self.port, None, False, wait, wait_for_workers=False)

    def _await_port(self, deadline: float) -> None:
        # Not by torch, which tries an address that gives no answer far longer than it was told.
        while True:
            left = deadline - time.monotonic()
            try:
                socket.create_connection((self.address, self.port), timeout=max(0.1, min(10.0, left))).close()
            except OSError as error:
                self._reason = error.strerror or str(error)
                if left <= 0:
                    raise
            else:
                self._reason = ""
                return
            time.sleep(0.2)

    def why(self) -> str:
        """What to look at where ranks do not come."""
        told = [self._reason] if self._reason else []
        if self._world.rank == 0 and not self._agents and not is_here(self.address):
            told.append(f"MASTER_ADDR={self.address} is no address of {self._world.node}, where rank 0 is (left over?)")
        elif self._world.rank != 0:
            told.append("rank 0 must be up (see its log), and the address one that all nodes reach")
        else:
            told.append(f"see their logs, they may have ended; the others reach {self}")
        return f"{'; '.join(told)}; how many ranks there are is from {_FROM.get(self._world.source, 'the launcher')}"

    def refusal(self, error: BaseException, within_s: float) -> DistlmError:
        """What the user is told when ranks do not meet."""
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "EADDRINUSE" in text or "already in use" in text:
            return DistlmError(
                f"MASTER_PORT={self.port} on {self._world.node} is taken by another program; export "
                "MASTER_PORT=<a free port from 20000 to 32767>, under Slurm by env: of the site file, and start again"
            )
        return DistlmError(
            f"{self._world} cannot join the others at MASTER_ADDR:MASTER_PORT={self.address}:{self.port} within "
            f"{within_s:g} s ({text}); {self.why()}"
        )


def _port(text: str) -> int:
    if not (text.isdigit() and 0 < int(text) < 65536):
        raise UsageError(f"MASTER_PORT={text}: must be a port, 1 to 65535; unset it, or export a free one")
    return int(text)


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
    raise DistlmError(
        f"{world}: MASTER_ADDR is not set and there is no Slurm to ask; export MASTER_ADDR=<first node> "
        "to all ranks (Open MPI: mpirun -x MASTER_ADDR)"
    )


def _master_port() -> int:
    """A port below the ephemeral range (32768 and up), different for each job of a node."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("PMIX_NAMESPACE") or str(os.getppid())
    digits = re.sub(r"\D", "", job.partition("@")[0]) or "0"
    # Steps of one job may run at once.
    step = os.environ.get("SLURM_STEP_ID", "0") if os.environ.get("SLURM_JOB_ID") else "0"
    return 20000 + (16 * int(digits) + int(step if step.isdigit() else 0)) % 10000
