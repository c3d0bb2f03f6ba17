"""What a stage will need before it starts: disk, memory, time."""

import time
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from distlm.runtime.files import format_bytes
from distlm.runtime.progress import format_seconds
from distlm.runtime.ranks.cores import usable_cores
from distlm.runtime.speeds import kept_flops


@dataclass(frozen=True)
class StagePlan:
    """Needs of one stage at a given rank count."""

    stage: str
    work: str
    """What will be done, in one line: counts and units."""
    disk_bytes: int
    """Bytes this stage writes, over all ranks."""
    memory_bytes: int
    """Peak resident memory of one rank that computes on the processor."""
    seconds: float | None
    """Estimated wall time, or None where nothing is known to estimate it from."""
    notes: list[str] = field(default_factory=list)
    """Anything the user should know before it starts."""
    known: bool = True
    """False: neither disk nor memory can be told yet, and they are 0 here."""
    finished: bool = False
    """There is nothing left to do."""
    device_bytes: int = 0
    """Peak memory on the device of a rank that has one; 0: not told apart."""
    host_bytes: int = 0
    """Peak of the host's memory for what such a rank keeps there, without the process itself."""
    units: tuple[int, ...] = ()
    """Units of work of each phase that the ranks share; none: it is not known, or one rank works."""

    def line(self) -> str:
        """One row for people."""
        if self.finished:
            return f"{self.stage:<16} finished; nothing to do"
        eta = "unknown" if self.seconds is None else f"about {format_seconds(self.seconds)}"
        sizes = (self.disk_bytes, self.memory_bytes)
        disk, memory = (format_bytes(size) if self.known else "unknown" for size in sizes)
        if self.device_bytes:
            memory += (
                f" (with a GPU {format_bytes(self.device_bytes)} on it, {format_bytes(self.host_bytes)} beside it)"
            )
        row = f"{self.stage:<16} {self.work}; disk {disk}, memory/rank {memory}, time {eta}"
        # Lines of a note that is a table stay below its first.
        notes = (note.replace("\n", f"\n{'':<17}") for note in self.notes)
        return "\n".join([row, *(f"{'':<16} note: {note}" for note in notes)])


MEASURED_S = 0.2
"""How long the machine's speed is measured."""


def rank_flops(threads: int, ranks: int) -> float:
    """FLOP/s of one of `ranks` ranks: with launch.threads of this machine's cores, or (0) its share of them.

    More ranks than there are cores are on other machines, each of them on one like this.
    """
    cores = usable_cores()
    share = cores / ranks if ranks <= cores else cores
    return machine_flops() * min(1.0, (threads or share) / cores)


@cache
def machine_flops() -> float:
    """Single-precision matrix-multiply rate of this process, in FLOP/s: the one that is kept, else measured now."""
    if (kept := kept_flops()) is not None:
        return kept
    size = 768
    left = np.ones((size, size), np.float32)
    left @ left
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < MEASURED_S:
        left @ left
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - start)
