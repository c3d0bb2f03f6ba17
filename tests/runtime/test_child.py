"""What a process starts: told to stop when it listens, killed with it or by a second Ctrl-C, and how it ended."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support import ENVIRONMENT
from support.deadline import DEADLINE_S, until

from distlm.errors import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, EXIT_USAGE
from distlm.runtime import child
from distlm.runtime.child import Idle, listens, start_stage, stop_reports, stopping, until_told_twice, verdict
from distlm.runtime.stop import WORD, StopFlag, report_stop

FAMILY = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"]).pid, flush=True)
time.sleep(900)
"""


@pytest.fixture(autouse=True)
def python_handles_ctrl_c() -> Iterator[None]:
    """As in a program that a shell starts; a shell's background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def started(code: str) -> subprocess.Popen[str]:
    return start_stage([sys.executable, "-c", code], ENVIRONMENT, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_rank_is_told_once_it_listens(tmp_path: Path) -> None:
    """A program called distlm that takes its time until it listens, as imports do; before that a signal would kill."""
    (tmp_path / "distlm.py").write_text(
        "import os, signal, sys\nprint('up', flush=True)\nsys.stdin.readline()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\nsignal.signal(signal.SIGUSR2, lambda *_: None)\n"
        "while True: signal.pause()\n", "utf-8",
    )  # fmt: skip
    # Started without the helper for its standard input.
    process = subprocess.Popen(
        [sys.executable, "-m", "distlm"], cwd=tmp_path, env={"PATH": os.environ["PATH"]}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert said(process) == "up" and not listens(process.pid)
    with StopFlag() as stop, stopping(process, stop):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.communicate("on\n", timeout=DEADLINE_S)
    assert process.returncode == EXIT_STOPPED


def test_a_second_ctrl_c_kills_all_that_was_started() -> None:
    process = started(FAMILY)
    below = int(said(process))
    with pytest.raises(KeyboardInterrupt), until_told_twice() as stop, stopping(process, stop):
        signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGINT" and process.poll() is None
        signal.raise_signal(signal.SIGINT)
    assert process.returncode == -signal.SIGKILL
    until(lambda: gone(below), "the end of what it had started")


def test_it_dies_with_the_process_that_started_it() -> None:
    code = (
        "import os, sys, time\nfrom distlm.runtime.child import start_stage\n"
        "print(start_stage([sys.executable, '-c', 'import time; time.sleep(900)'], os.environ).pid, flush=True)\n"
        "time.sleep(900)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    child = int(said(parent))
    assert os.getsid(child) == child != os.getsid(parent.pid), "out of reach of the terminal"
    parent.kill()
    parent.communicate()
    until(lambda: gone(child), "the end of the orphan")


@pytest.mark.parametrize(
    ("code", "asked", "word", "ended"),
    [
        (0, False, False, EXIT_DONE),
        (0, True, True, EXIT_DONE),
        (75, False, False, EXIT_STOPPED),
        # torchrun's code when its ranks end with 75.
        (1, True, True, EXIT_STOPPED),
        (1, True, False, EXIT_ERROR),
        (2, True, False, EXIT_USAGE),
        (1, False, False, EXIT_ERROR),
        # A launcher that a signal to everything has ended.
        (-15, True, False, EXIT_STOPPED),
        (143, True, False, EXIT_STOPPED),
        (-9, False, False, -9),
    ],
)
def test_how_a_stage_ended(code: int, asked: bool, word: bool, ended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopFlag()
    stop.reason = "SIGTERM" if asked else None
    with stop_reports() as env:
        if word:
            monkeypatch.setenv(WORD, env[WORD])
            report_stop()
        assert verdict(code, env, stop) == ended


def test_a_mpirun_that_hangs_at_its_end_is_killed_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that has removed its session folder and waits; a real one does so once in thousands of starts."""
    monkeypatch.setattr(child, "IDLE_S", 0.5)
    code = (
        "import os, pathlib, shutil, sys, time\n"
        f"place = pathlib.Path({str(tmp_path)!r}) / f'ompi.{{os.getpid()}}'\n"
        "place.mkdir()\nopened = (place / 'hwloc.sm').open('w')\n"
        "if 'hang' in sys.argv: shutil.rmtree(place)\n"
        "print('up', flush=True)\ntime.sleep(900)\n"
    )
    hanging, working = (
        start_stage([sys.executable, "-c", code, word], ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for word in ("hang", "work")
    )
    try:
        assert said(hanging) == said(working) == "up"
        watch = Idle(working.pid)
        with stopping(hanging, StopFlag()):
            assert hanging.wait(timeout=DEADLINE_S) == -signal.SIGKILL
        assert not watch.look() and working.poll() is None
    finally:
        for process in (hanging, working):
            process.kill()
            process.wait()
