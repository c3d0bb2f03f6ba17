"""Who trains together."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from distlm.errors import DistlmError
from distlm.index.build.encode import one_thread_workers
from distlm.runtime.ranks.comm import Comm, SingleComm
from distlm.runtime.ranks.cores import usable_cores


def _go_on() -> None:
    return None


@dataclass(frozen=True)
class Team:
    """The ranks that train one index, and this one's part of its machine."""

    comm: Comm = field(default_factory=SingleComm)
    threads: int = 1
    """Of this rank."""
    device: str = ""
    """Torch's name of the GPU that finds the nearest centroids; empty: the processor."""
    check: Callable[[], None] = _go_on
    """Called by all ranks at once now and then; raises Stopped where a signal came."""

    @contextmanager
    def workers(self) -> Iterator[ThreadPoolExecutor]:
        """Threads of this rank; each runs faiss on one thread."""
        with one_thread_workers(self.threads) as pool:
            yield pool

    @property
    def node_threads(self) -> int:
        """Threads that rank 0 trains with while the others wait."""
        return usable_cores()


@contextmanager
def refused(factory: str) -> Iterator[None]:
    """What faiss cannot train, as a DistlmError that names the factory."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2].strip()
        raise DistlmError(f"index.factory={factory!r}: training failed ({reason})") from error
