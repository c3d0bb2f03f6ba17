"""Stop signals in one process: from its first line to its last, once, twice, ignored, and when nobody reads."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ENVIRONMENT
from support.deadline import DEADLINE_S

from distlm.errors import EXIT_STOPPED
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.stop import SIGNALS, WORD, StopFlag

BEGIN = "import os, signal, sys\nfrom distlm.runtime.stop import *\nlisten()\n"
KILL = "os.kill(os.getpid(), signal.SIG{})\n"


def run(code: str, prepare: Callable[[], object] | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own; `python -c` starts as ever."""
    return subprocess.run(
        [sys.executable, "-c", BEGIN + code], env={**ENVIRONMENT, **environment}, capture_output=True, text=True,
        timeout=DEADLINE_S, preexec_fn=prepare or terminal_signals,
    )  # fmt: skip


def terminal_signals() -> None:
    """As a shell starts a program."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def test_nothing_heavy_is_imported_before_the_command_listens() -> None:
    heavy = "print([n for n in ('numpy', 'torch', 'yaml', 'distlm.cli', 'distlm.config') if n in sys.modules])"
    assert run(f"import distlm.main\n{heavy}").stdout == "[]\n"
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert 'distlm = "distlm.main:main"' in text, "the console script is python -m distlm"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_flag_takes_up_what_came_before_it(number: signal.Signals) -> None:
    done = run(KILL.format(number.name[3:]) + "with StopFlag() as stop: print(stop.reason)")
    assert (done.returncode, done.stdout) == (0, f"{number.name}\n")
    more = "once more" if number == signal.SIGINT else "Ctrl-C (SIGINT)"
    assert done.stderr == f"{number.name}: stopping after this unit of work; {more} to end at once\n"


def test_other_ranks_and_what_a_run_starts_do_not_say_it_again(tmp_path: Path) -> None:
    code = "with StopFlag({}):\n " + KILL.format("TERM")
    assert run(code.format(1)).stderr == ""
    assert run(code.format(0), None, **{WORD: str(tmp_path / "word")}).stderr == ""


@pytest.mark.parametrize("first", ["INT", "TERM"])
def test_a_second_ctrl_c_ends_at_once(first: str) -> None:
    code = "with StopFlag():\n " + KILL.format(first) + " print('first', flush=True)\n " + KILL.format("INT")
    done = run(code + " print('second')")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "first\n")


def test_other_signals_may_come_again() -> None:
    code = "with StopFlag() as stop:\n" + "".join(" " + KILL.format(n) for n in ("HUP", "HUP", "USR1", "TERM", "USR1"))
    assert run(code + " print(stop.reason)").stdout == "SIGHUP\n"


def test_what_is_no_stage_ends_at_once() -> None:
    done = run("end_at_once()\n" + KILL.format("TERM") + "print('on')")
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_STOPPED, "", "stopped by SIGTERM\n")
    early = run(KILL.format("TERM") + "try: end_at_once()\nexcept Exception as error: print(error)")
    assert early.stdout == "stopped by SIGTERM\n"


def test_after_the_work_a_signal_is_ignored() -> None:
    assert run("ignore_late_signals()\n" + "".join(KILL.format(number.name[3:]) for number in SIGNALS)).returncode == 0


def test_what_nohup_ignores_stays_ignored() -> None:
    def nohup() -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    code = "with StopFlag() as stop:\n" + "".join(" " + KILL.format(n) for n in ("HUP", "INT"))
    # Launchers ignore USR1 until a rank listens.
    done = run(code + " print(stop.reason)\n " + KILL.format("USR1") + " print(stop.reason)", nohup)
    assert done.stdout == "None\nSIGUSR1\n"


def test_work_is_saved_though_nobody_reads(tmp_path: Path) -> None:
    """Ctrl-C also ends the `tee` that a command is piped into."""
    code = "with StopFlag() as stop:\n " + KILL.format("TERM")
    code += f" print('x', flush=True)\n print('y', file=sys.stderr)\n open({str(tmp_path / 'saved')!r}, 'w').close()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], env=ENVIRONMENT, stdout=writer, stderr=writer, timeout=DEADLINE_S
    )
    os.close(writer)
    assert done.returncode == 0 and (tmp_path / "saved").exists()


def test_a_flag_of_a_process_that_does_not_listen_puts_handlers_back() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _frame: seen.append(number))
    streams = sys.stdout, sys.stderr
    try:
        with StopFlag() as stop:
            signal.raise_signal(signal.SIGUSR2)
            assert stop.agreed(SingleComm()) and not seen
        signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [signal.SIGUSR2] and streams == (sys.stdout, sys.stderr)
