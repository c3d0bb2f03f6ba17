"""Units of work over the ranks: each takes a run of units that follow one another, in rounds of some seconds.

The plan decides the units, and nothing that is written depends on who does which. Runs instead of every R-th unit,
because neighbouring units lie in one file: few ranks write or read it at once, and most files are one rank's alone.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import TypeVar

from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import together
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.stage import Stage
from distlm.runtime.units.planned import idle_note

T = TypeVar("T")
R = TypeVar("R")

ROUND_S = 10.0
"""A round takes about so long: then a stop signal is heeded, and what was done is recorded."""
_GROWTH = 4
"""A round has at most so many times the units of the one before."""


def share_of_units(units: Sequence[T], rank: int, ranks: int) -> Sequence[T]:
    """The run of units of one rank: all runs together are `units`, and their lengths differ by one at most."""
    return units[len(units) * rank // ranks : len(units) * (rank + 1) // ranks]


def first_readers(shards: Sequence[int], ranks: int) -> dict[int, int]:
    """Shard → the rank whose run has its first unit; `shards` has the shard of every unit, in order."""
    readers: dict[int, int] = {}
    for rank in range(ranks):
        for shard in share_of_units(shards, rank, ranks):
            readers.setdefault(shard, rank)
    return readers


def say_idle(comm: Comm, label: str, units: int, mend: str) -> None:
    """Say how many ranks will have nothing to do, where there are more than units; `mend`: what changes that."""
    for note in idle_note(units, comm.size, mend):
        say(f"{label}: {note}", comm.rank)


def rounds(
    stage: Stage, label: str, pending: Sequence[T], act: Callable[[Sequence[T]], R], at_once: int = 1
) -> Iterator[list[R]]:
    """`act` on all units, some of each rank's run in every round; gives what it returned on each rank. Collective.

    `pending` is the same on every rank. `act` gets units in order, at least `at_once` where there are as many (for its
    threads), none on a rank that is done. Errors and stop signals reach all ranks.
    """
    comm = stage.comm
    # Every rank makes the same rounds.
    at_once = max(comm.allgather(at_once))
    mine = share_of_units(pending, comm.rank, comm.size)
    longest, place, count = ceil(len(pending) / comm.size), 0, at_once
    while place < longest:
        stage.stop.check(comm, label)
        began = time.monotonic()
        run = mine[place : place + count]
        result = together(comm, lambda run=run: act(run))  # type: ignore[misc]
        told = comm.allgather((time.monotonic() - began, result))
        place += count
        slowest = max(seconds for seconds, _ in told)
        wanted = min(count * ROUND_S / max(slowest, 1e-3), count * _GROWTH)
        # Whole turns of its threads.
        count = max(1, int(wanted / at_once)) * at_once
        yield [result for _, result in told]
