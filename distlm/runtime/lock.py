"""One writer at a time in a folder: an advisory lock that the kernel drops when its holder dies."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distlm.errors import DistlmError
from distlm.runtime.collective import rank0_first
from distlm.runtime.comm import Comm

LOCK = ".lock"
"""Name of the lock file; it stays in the folder."""


@contextmanager
def only_writer(folder: Path, comm: Comm, work: str) -> Iterator[None]:
    """Hold `folder`/.lock on rank 0 for the block. Collective.

    Raises DistlmError on every rank when another run still holds it after 5 s (a killed run needs a moment to die).
    A file system without locks is taken as it is.
    """
    lock = None

    def take() -> None:
        nonlocal lock
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
        deadline = time.monotonic() + 5
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    lock.close()
                    raise DistlmError(
                        f"{folder}: another run is {work} here; wait for it or end it, or choose another run_dir="
                    ) from error
                time.sleep(0.1)
            except OSError:
                return

    rank0_first(comm, take)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()
