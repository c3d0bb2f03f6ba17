"""Stop signals. Handlers only record; the ranks agree at a step or unit boundary."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from distlm.errors import Stopped
from distlm.runtime.ranks.comm import Comm

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Stop signals go to `handler` inside it, and afterwards where they went before."""
    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class StopFlag:
    """Records the first of SIGTERM, SIGUSR1, SIGUSR2 while in its `with` block; later ones are ignored.

    Launchers do not signal all ranks at once, so a rank's own flag decides nothing: use `agreed` or `check`.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._handled = ExitStack()

    def __enter__(self) -> "StopFlag":
        self._handled.enter_context(on_stop_signals(self._record))
        return self

    def __exit__(self, *_error: object) -> None:
        self._handled.close()

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def agreed(self, comm: Comm) -> bool:
        """True on every rank at the same call once any rank was signalled. Collective."""
        return comm.any(self.reason is not None)

    def check(self, comm: Comm, what: str) -> None:
        """Raise Stopped on every rank once any rank was signalled. Collective; call at a unit boundary."""
        if self.agreed(comm):
            raise Stopped(f"stopped at a boundary of {what}; run the same command again to continue")


def ignore_late_signals() -> None:
    """At the very end of a process: a stop that comes now must not make a failure of work that is done."""
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.SIG_IGN)
