"""Stages that this process starts: told by it when to stop, apart from its terminal, and never left behind."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from distlm.errors import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, EXIT_USAGE
from distlm.runtime.alive import STARTER, this_process
from distlm.runtime.stop import SIGNALS, WORD, StopFlag

_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 0.1
IDLE_S = 30.0
"""So long a mpirun may take to end after its ranks have: Open MPI's may wait for itself for ever (a lock that is held
in PMIx_server_finalize), seen once in some thousand starts."""


def until_told_twice() -> StopFlag:
    """The StopFlag of a process that starts stages: at a second Ctrl-C it is interrupted, and ends them with itself."""
    return StopFlag(second=signal.default_int_handler)


def start_stage(command: Sequence[str], env: Mapping[str, str], **streams: Any) -> subprocess.Popen[str]:
    """Start a stage, or the launcher of its ranks, with subprocess's `streams`.

    In a session of its own: launchers end their ranks at Ctrl-C and when the terminal closes, and this process, which
    alone is told then, lets them stop in order (`tell_ranks`). When this process is killed, so is what it started.
    """
    libc, parent = ctypes.CDLL(None), os.getpid()
    # A launcher needs its life to end its ranks.
    number = signal.SIGKILL if command[0] == sys.executable else signal.SIGTERM

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(EXIT_ERROR)

    return subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent, **streams
    )


def waited_for_s() -> float:
    """Processor time, user and system, of this process's descendants that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def stop_reports() -> Iterator[dict[str, str]]:
    """Environment for ranks: they tell `verdict` when they end with 75, and end when this process is gone."""
    with TemporaryDirectory(prefix="distlm-stopped-", ignore_cleanup_errors=True) as folder:
        yield {WORD: str(Path(folder) / "word"), STARTER: this_process()}


def verdict(code: int, env: Mapping[str, str], stop: StopFlag) -> int:
    """How the stage ended whose launcher, started with `env`, ended with `code`: 75 when its ranks stopped."""
    if code == EXIT_DONE:
        return code
    # A launcher may end with 1 when ranks end with 75, or die itself by a signal that was meant for its ranks.
    stopped = Path(env[WORD]).exists() or (stop.reason is not None and code not in (EXIT_ERROR, EXIT_USAGE))
    return EXIT_STOPPED if stopped else code


class Idle:
    """Whether a mpirun hangs at its end: it has removed its session folder, which it does last, IDLE_S ago."""

    def __init__(self, launcher: int) -> None:
        self._launcher = launcher
        self._looked, self._since = 0.0, 0.0

    def look(self) -> bool:
        """Call it again and again."""
        now = time.monotonic()
        if now - self._looked < 1.0:
            return False
        self._looked = now
        if not _session_is_gone(self._launcher):
            self._since = 0.0
            return False
        self._since = self._since or now
        return now - self._since > IDLE_S


def _session_is_gone(launcher: int) -> bool:
    """A file of the session folder that a mpirun of Open MPI still has open has no name any more (Linux)."""
    with suppress(OSError):
        for file in Path(f"/proc/{launcher}/fd").iterdir():
            with suppress(OSError):
                place = str(file.readlink())
                if f"/ompi.{launcher}/" in place and place.endswith("(deleted)"):
                    return True
    return False


@contextmanager
def stopping(process: subprocess.Popen[Any], stop: StopFlag) -> Iterator[None]:
    """For the block, a stop of this process is handed on to the ranks of `process`; an exception ends them.

    A launcher that hangs after its ranks have ended is killed.
    """
    done, idle = threading.Event(), Idle(process.pid)

    def hand_on() -> None:
        while not done.wait(_LOOK_EVERY_S):
            if stop.reason is not None:
                tell_ranks(process.pid)
            if idle.look():
                end_all(process)

    teller = threading.Thread(target=hand_on, name="distlm-stopping", daemon=True)
    teller.start()
    try:
        yield
    except BaseException:
        end_all(process)
        raise
    finally:
        done.set()
        teller.join()


def tell_ranks(launcher: int) -> None:
    """SIGUSR1 to every rank below a launcher (or to the stage itself) that listens; call it until it has ended.

    All at once: launchers forward signals late, singly or not at all. Again and again: some ranks may not have been
    started yet, or not listen yet, which the signal would kill. To those that know it already it is nothing new.
    """
    for child in _family(launcher):
        with suppress(psutil.Error):
            # A rank's command line begins with Python and runs distlm; launchers only carry it as arguments.
            words = child.cmdline()
            rank = words[1:3] == ["-m", "distlm"] or words[1:4] == ["-u", "-m", "distlm"]
            if rank and listens(child.pid):
                child.send_signal(signal.SIGUSR1)


def end_all(process: subprocess.Popen[Any]) -> None:
    """Kill a launcher and all that it has started, at once."""
    for child in _family(process.pid):
        with suppress(psutil.Error):
            child.kill()
    process.wait()


def listens(pid: int) -> bool:
    """Whether a process has handlers for stop signals (Linux; elsewhere it is taken to have them)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    except OSError:
        return not Path("/proc/self/status").exists()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    # It sets this handler last, so the others are there, too.
    return bool(int(caught, 16) >> (SIGNALS[-1] - 1) & 1)


def _family(launcher: int) -> list[psutil.Process]:
    try:
        first = psutil.Process(launcher)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
