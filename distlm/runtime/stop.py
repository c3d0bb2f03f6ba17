"""Stop signals. Handlers only record; the ranks agree at a step or unit boundary.

A process of its own listens from its first line on (`listen`, called by distlm.main), so that a signal in the seconds
of its imports is no crash: a stage takes it up when its ranks have joined, and what is no stage ends at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from distlm.errors import EXIT_STOPPED, Stopped

if TYPE_CHECKING:
    from distlm.runtime.ranks.comm import Comm

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
WORD = "DISTLM_STOPPED"
"""Environment variable of what `distlm run` starts: the file that a rank makes when it ends with 75. Not every launcher
hands its ranks' exit code on."""

Handler = Callable[[int, FrameType | None], Any]


class _Process:
    """What this process has heard by itself, before a StopFlag listened."""

    listening = False
    heard: str | None = None
    ends_at_once = False


def listen() -> None:
    """First thing in a process of its own: from now on a stop signal is recorded and does not kill."""
    _Process.listening = True
    for number in _ours():
        signal.signal(number, _note)
    if WORD in os.environ or os.isatty(1) or os.isatty(2):
        # The reader of the output, or the terminal, may be gone before the stop signal comes.
        _outlast_readers()


def earlier() -> str | None:
    """Name of the signal that came to this process before anything else listened."""
    return _Process.heard


def end_at_once() -> None:
    """From now on a stop signal ends this process with 75, having nothing to finish, until a StopFlag listens.

    Raises Stopped when one has come before. Does nothing in a process that does not listen.
    """
    if _Process.listening:
        _Process.ends_at_once = True
        if _Process.heard is not None:
            raise Stopped(f"stopped by {_Process.heard}")


def ignore_late_signals() -> None:
    """At the very end of a process: a stop that comes now must not make a failure of work that is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def report_stop() -> None:
    """This process ends with 75: tell the process that started its launcher."""
    if path := os.environ.get(WORD):
        with suppress(OSError), open(path, "a"):  # noqa: PTH123 (pathlib takes time to import)
            pass


@contextmanager
def on_stop_signals(handler: Handler) -> Iterator[None]:
    """Stop signals go to `handler` inside it, and afterwards where they went before.

    Those of a terminal (INT, HUP) stay ignored where they are: by nohup, by a shell for what runs in its background.
    """
    previous = {number: signal.signal(number, handler) for number in _ours()}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class StopFlag:
    """Records the first stop signal while in its `with` block, or from before it in a process that listens.

    A second Ctrl-C (SIGINT) ends at once. Other signals are ignored after the first: Slurm repeats its signals, and a
    closing terminal sends several. Launchers do not signal all ranks at once, so a rank's own flag decides nothing: use
    `agreed` or `check`.
    """

    def __init__(self, rank: int = 0, second: Handler | signal.Handlers = signal.SIG_DFL) -> None:
        """`rank`: the first one says that it stops. `second`: handler of a second Ctrl-C."""
        self.reason: str | None = None
        self._rank, self._second = rank, second
        self._handled = ExitStack()

    def __enter__(self) -> "StopFlag":
        self._handled.enter_context(on_stop_signals(self._record))
        if self.reason is None and (name := earlier()) is not None:
            self._stop(name)
        return self

    def __exit__(self, *_error: object) -> None:
        self._handled.close()

    def _record(self, number: int, _frame: FrameType | None) -> None:
        if self.reason is None:
            self._stop(signal.Signals(number).name)

    def _stop(self, name: str) -> None:
        self.reason = name
        _outlast_readers()
        if signal.SIGINT in _ours():
            signal.signal(signal.SIGINT, self._second)
        # `distlm run` has said so already for the stages that it started.
        if self._rank == 0 and WORD not in os.environ:
            more = "once more" if name == "SIGINT" else "Ctrl-C (SIGINT)"
            _tell(f"{name}: stopping after this unit of work; {more} to end at once")

    def agreed(self, comm: "Comm") -> bool:
        """True on every rank at the same call once any rank was signalled. Collective."""
        return comm.any(self.reason is not None)

    def check(self, comm: "Comm", what: str) -> None:
        """Raise Stopped on every rank once any rank was signalled. Collective; call at a unit boundary."""
        if self.agreed(comm):
            raise Stopped(f"stopped at a boundary of {what}; run the same command again to continue")


class _Lasting:
    """Standard output or error that goes on when nobody reads it any more.

    A terminal that closes sends SIGHUP and takes no more output; Ctrl-C ends the `tee` of a pipe, too. Neither may be
    an error for the work that is still to be saved.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _ours() -> list[signal.Signals]:
    terminal = (signal.SIGINT, signal.SIGHUP)
    return [number for number in SIGNALS if number not in terminal or signal.getsignal(number) != signal.SIG_IGN]


def _note(number: int, _frame: FrameType | None) -> None:
    if _Process.heard is None:
        _Process.heard = signal.Signals(number).name
        _outlast_readers()
        if signal.SIGINT in _ours():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _Process.ends_at_once:
        _tell(f"stopped by {_Process.heard}")
        sys.exit(EXIT_STOPPED)


def _outlast_readers() -> None:
    if _Process.listening and not isinstance(sys.stdout, _Lasting):
        sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)


def _tell(text: str) -> None:
    # Not print: this interrupts what may be printing, and Python's streams refuse to be entered twice.
    with suppress(OSError):
        # On a terminal there may be a bar, or ^C.
        os.write(2, ("\n" * os.isatty(2) + text + "\n").encode())
