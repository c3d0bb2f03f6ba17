"""Ranks as threads of this process."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from distlm.runtime.ranks.comm import SingleComm

T = TypeVar("T")


class ThreadComm(SingleComm):
    """One of them; all share the barrier and the box, a list of a place for each."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, box: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._box = rank, size, barrier, box

    def barrier(self) -> None:
        self._barrier.wait(600)

    def allgather(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait(600)
        found = list(self._box)
        self._barrier.wait(600)
        return found

    def gather(self, value: Any) -> list[Any] | None:
        found = self.allgather(value)
        return None if self.rank else found

    def bcast(self, value: Any) -> Any:
        return self.allgather(value)[0]

    def any(self, flag: bool) -> bool:
        return any(self.allgather(flag))


def on_threads(ranks: int, act: Callable[[ThreadComm], T]) -> list[T]:
    """What `act` gives on each rank."""
    barrier, box = threading.Barrier(ranks), [None] * ranks
    found: list[Any] = [None] * ranks

    def one(rank: int) -> None:
        found[rank] = act(ThreadComm(rank, ranks, barrier, box))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not any(thread.is_alive() for thread in threads)
    return found
