"""Mpiruns of Open MPI that hang in their own end.

prterun may wait for ever in PMIx_server_finalize: its other thread waits for a lock of a peer that is freed already
(seen with Open MPI 5.0.11 about once in a thousand starts whose ranks ended with an error; PRRTE's issue 1607 is its
like). It has then removed its session folder, by which it is known (distlm.runtime.child.Idle). A test whose mpirun
hung says nothing of distlm: the mpirun is killed, and the test is run again.
"""

import os
import threading
from types import TracebackType

import psutil

from distlm.runtime.child import Idle

_EVERY_S = 2.0


class Watch:
    """For a block, those below this process are killed; `killed` has their process numbers."""

    def __init__(self) -> None:
        self.killed: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread()

    def __enter__(self) -> "Watch":
        self.killed, self._ended = [], threading.Event()
        self._thread = threading.Thread(target=self._look, name="mpiruns", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _place: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        known: dict[int, Idle] = {}
        while not self._ended.wait(_EVERY_S):
            try:
                below = psutil.Process(os.getpid()).children(recursive=True)
            except psutil.Error:
                continue
            for process in below:
                if known.setdefault(process.pid, Idle(process.pid)).look():
                    self.killed.append(process.pid)
                    process.kill()
