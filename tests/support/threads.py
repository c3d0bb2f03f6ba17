"""Ranks as threads of this process."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from distlm.runtime.ranks.comm import SingleComm

T = TypeVar("T")


class ThreadComm(SingleComm):
    """One of the ranks; `barrier` and `box`, of one place a rank, are those of all."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, box: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._box = rank, size, barrier, box

    def barrier(self) -> None:
        self._barrier.wait(30)

    def allgather(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait(30)
        found = list(self._box)
        self._barrier.wait(30)
        return found

    def gather(self, value: Any) -> list[Any] | None:
        found = self.allgather(value)
        return None if self.rank else found

    def bcast(self, value: Any) -> Any:
        return self.allgather(value)[0]

    def any(self, flag: bool) -> bool:
        return any(self.allgather(flag))


def on_ranks(ranks: int, act: Callable[[ThreadComm], T]) -> list[T | Exception]:
    """What `act` gives on each rank, or the exception that it ends with."""
    barrier, box = threading.Barrier(ranks), [None] * ranks
    found: list[Any] = [None] * ranks

    def one(rank: int) -> None:
        try:
            found[rank] = act(ThreadComm(rank, ranks, barrier, box))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return found
