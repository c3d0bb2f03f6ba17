"""torch on one thread of this process: products that threads share follow, in their last bits, how many there are."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside: dict[int, int] = {}
"""Thread → blocks of one_thread that it is in."""
_before = 1
"""torch's thread count when the first of them began."""


@contextmanager
def one_thread() -> Iterator[int]:
    """torch's thread count is 1 in this thread inside; gives what it was. Several threads may be inside at once, and
    blocks of one thread may end in any order: the last one puts the count back.

    torch's count is of a thread, and a new thread begins with the one that was set last, by whichever thread: those
    that work inside are of `one_thread_workers`.
    """
    global _before
    thread = threading.get_ident()
    with _lock:
        found = _alone()
        if not _inside:
            _before = found
        # A thread that began while others are inside has their 1, not a count of its own.
        threads = _before
        _inside[thread] = _inside.get(thread, 0) + 1
    try:
        yield threads
    finally:
        with _lock:
            _inside[thread] -= 1
            if not _inside[thread]:
                del _inside[thread]
                torch.set_num_threads(threads)


def one_thread_workers(threads: int, name: str) -> ThreadPoolExecutor:
    """Threads in each of which torch has one; for use inside one_thread, which puts back what new threads begin
    with."""
    return ThreadPoolExecutor(threads, name, initializer=_alone)


def _alone() -> int:
    """torch's thread count is 1 in this thread from now on; what it was."""
    # Asked first: torch gives a new thread its count when that is first needed, whatever was set in it before.
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    return found
