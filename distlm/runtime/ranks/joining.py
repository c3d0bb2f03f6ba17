"""Ranks of one start find each other: whatever an earlier start has left in the store, and saying who is awaited.

A store may outlive a start: torchrun's agents keep theirs over their restarts, with the addresses of ranks that are
gone, and no number of the attempt is the same on all agents (each counts its own restarts). So every rank makes itself
known by a name of its own, rank 0 answers to that name, and what the ranks tell each other then lies under a name that
rank 0 made: nothing that was left there is taken for new.
"""

import ctypes
import os
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from distlm.errors import DistlmError
from distlm.runtime.ranks.world import World

SAY_AT_S = (10, 30, 60, 120, 180, 300)
"""Seconds of waiting after which it is said who is awaited; later every five minutes."""
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1
_GO = "go"


def meet(store: Any, world: World, within_s: float, waiting: "Waiting") -> str:
    """Wait for all ranks of this start in a store of torch.distributed; the name under which they meet. Collective.

    Raises DistlmError on every rank that is there when some do not come within `within_s`, naming them.
    """
    return _receive(store, world, within_s, waiting) if world.rank == 0 else _arrive(store, world, within_s, waiting)


def _receive(store: Any, world: World, within_s: float, waiting: "Waiting") -> str:
    name, deadline = uuid.uuid4().hex, time.monotonic() + within_s
    seen: dict[int, bytes] = {}
    missing = list(range(1, world.size))
    while missing:
        for rank in missing:
            if store.check([f"hello/{rank}"]) and seen.get(rank) != (known := store.get(f"hello/{rank}")):
                seen[rank] = known
                store.set(f"welcome/{rank}/{known.decode()}", name)
        missing = [rank for rank in missing if not store.check([f"{name}/{rank}"])]
        waiting.what = f"waiting for {ranks_in_words(missing)} of {world.size}"
        if missing and time.monotonic() > deadline:
            text = f"{ranks_in_words(missing)} of {world.size} did not come"
            store.set(f"{name}/{_GO}", text)
            # The store may be this process: let the others read it.
            time.sleep(1)
            raise DistlmError(text)
        time.sleep(_POLL_S if missing else 0)
    store.set(f"{name}/{_GO}", _GO)
    return name


def _arrive(store: Any, world: World, within_s: float, waiting: "Waiting") -> str:
    own = uuid.uuid4().hex
    store.set(f"hello/{world.rank}", own)
    waiting.what = "waiting for rank 0 to answer"
    store.wait([f"welcome/{world.rank}/{own}"], timedelta(seconds=within_s))
    name = store.get(f"welcome/{world.rank}/{own}").decode()
    store.set(f"{name}/{world.rank}", own)
    # It is rank 0 that says who is missing, and by its clock.
    waiting.what = ""
    store.wait([f"{name}/{_GO}"], timedelta(seconds=within_s + 30))
    if (text := store.get(f"{name}/{_GO}").decode()) != _GO:
        raise DistlmError(text)
    return name


class Waiting:
    """Says on standard error what this rank waits for, after 10 s and now and then, while in its `with` block."""

    def __init__(self, world: World, what: str, why: Callable[[], str]) -> None:
        """`what` may be set anew, empty: nothing is said. `why`: where to look, asked when it is said."""
        self.what, self._world, self._why = what, world, why
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distlm-waiting", daemon=True)

    def __enter__(self) -> "Waiting":
        # Two of a node: one of them is not the one that is missing.
        if self._world.local_rank < 2:
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        for pause, total in pauses():
            if self._ended.wait(pause):
                return
            if self.what:
                say_waiting(self._world, f"{self.what} for {total} s: {self._why()}")


@contextmanager
def waiting_outside(world: World, what: str) -> Iterator[None]:
    """As Waiting, by a process of its own: for calls that keep Python's lock, as MPI_Init does."""
    with warnings.catch_warnings():
        # Python warns of a fork beside other threads. The child below calls nothing that they may have locked.
        warnings.simplefilter("ignore", DeprecationWarning)
        parent, child = os.getpid(), os.fork()
    if child == 0:
        _say_until_killed(world, what, parent)
    try:
        yield
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _say_until_killed(world: World, what: str, parent: int) -> None:
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        for pause, total in pauses():
            time.sleep(pause)
            if os.getppid() != parent:
                break
            os.write(2, f"{_who(world)} {what} for {total} s\n".encode())
    finally:
        os._exit(0)


def pauses() -> Iterator[tuple[float, int]]:
    """Seconds until the next word, and since the beginning by then."""
    before = 0
    for total in SAY_AT_S:
        yield total - before, total
        before = total
    while True:
        before += SAY_AT_S[-1]
        yield SAY_AT_S[-1], before


def say_waiting(world: World, text: str) -> None:
    """One line of a rank; not as an error's."""
    print(f"{_who(world)} {text}", file=sys.stderr, flush=True)


def ranks_in_words(ranks: list[int]) -> str:
    """`rank 3`, `ranks 3, 4, 5, …`."""
    shown = ", ".join(map(str, ranks[:8])) + (f", … ({len(ranks)} in all)" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def _who(world: World) -> str:
    return f"[rank {world.rank} on {world.node}]"
