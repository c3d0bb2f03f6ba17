"""`distlm run` and its like are told to stop: at a terminal, by a closing one, between stages, under torchrun."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from support import ENVIRONMENT, shared, warm
from support.deadline import DEADLINE_S, until
from support.shared import whole_settings

from distlm import pipeline
from distlm.config.load import load_config
from distlm.errors import EXIT_DONE, EXIT_STOPPED
from distlm.reproduce import run as reproduce
from distlm.reproduce.experiment import Experiment, Item
from distlm.runtime.stop import StopFlag

OUTER = [sys.executable, "-c", "from distlm.main import main; main()"]
"""`distlm` as a process of its own and of the terminal; the ranks that it starts are forked from the warm one."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared.whole(tmp_path_factory)[0]


def settings(text: Path, run: Path, *more: str) -> list[str]:
    """A training that does not end while it is looked at."""
    return [*whole_settings(run, text), "train.updates=100000", "train.save_every=50", "train.valid_every=0", *more]


def trains(run: Path, process: subprocess.Popen[bytes]) -> None:
    until(lambda: list(run.glob("checkpoints/step-*")), "a checkpoint", lambda: process.poll() is None)


def at_terminal(words: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """In the foreground of a new terminal; its other end."""
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [*OUTER, *words], env={**ENVIRONMENT, "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)
    return process, ours


def read_all(terminal: int) -> str:
    shown = b""
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # nobody has it open any more
            data = b""
        if not data:
            return shown.decode("utf-8", "replace")
        shown += data


def processes_of(run: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(str(run) in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.mark.multiprocess
def test_ctrl_c_at_a_terminal_stops_the_ranks_in_order(text: Path, tmp_path: Path) -> None:
    """mpirun, which kills its ranks at Ctrl-C, does not get it."""
    run = tmp_path / "run"
    process, terminal = at_terminal(["run", "demo", *settings(text, run)])
    trains(run, process)
    os.write(terminal, b"\x03")
    shown = read_all(terminal)
    os.close(terminal)
    assert process.wait(DEADLINE_S) == EXIT_STOPPED, shown
    assert "SIGINT: stopping after this unit of work; once more to end at once" in shown
    assert "train: stopped after update" in shown and not processes_of(run)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_closing_terminal_stops_them_in_order(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process, terminal = at_terminal(["run", "demo", *settings(text, run)])
    trains(run, process)
    os.close(terminal)
    assert process.wait(DEADLINE_S) == EXIT_STOPPED
    assert "train: stopped after update" in (run / "logs" / "train.log").read_text("utf-8")


@contextmanager
def training(text: Path, run: Path, launcher: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `distlm run` that trains on two ranks."""
    words = settings(text, run, *([] if launcher == "mpirun" else [f"launch.launcher={launcher}"]))
    # A warm start of torchrun would have its ranks below the server of warm starts.
    environment = ENVIRONMENT if launcher == "mpirun" else {**ENVIRONMENT, **warm.COLD}
    process = subprocess.Popen(
        [*OUTER, "run", "demo", *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        trains(run, process)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "launcher",
    ["mpirun", *(pytest.param(launcher, marks=pytest.mark.slow) for launcher in ("torchrun", "deepspeed"))],
)
def test_a_killed_run_leaves_no_ranks_behind(launcher: str, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training(text, run, launcher) as process:
        process.kill()
        until(lambda: not processes_of(run), lambda: f"the end of {processes_of(run)}")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_torchrun_ends_with_1_and_the_run_with_75(text: Path, tmp_path: Path) -> None:
    with training(text, tmp_path / "run", "torchrun") as process:
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=DEADLINE_S)[0].decode()
    assert process.returncode == EXIT_STOPPED, output
    assert "train: stopped after update" in output and "run the same command again" in output


def test_a_stop_between_stages_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first stage ends as if nothing had been, having no unit to stop after; the second is not begun."""
    config = load_config("demo", [f"run_dir={tmp_path / 'run'}"])
    done: list[str] = []

    def stage(words: str, stop: StopFlag) -> int:
        done.append(words)
        stop.reason = "SIGTERM"
        return EXIT_DONE

    steps = [pipeline.Step(words, False, lambda *_, words=words: words in done) for words in ("data prepare", "train")]
    monkeypatch.setattr(pipeline, "steps_of", lambda _config: steps)
    monkeypatch.setattr(pipeline, "_check_before", lambda *_: None)
    monkeypatch.setattr(
        pipeline, "_run_command", lambda command, log, config, stop: (stage(steps[len(done)].words, stop), "")
    )
    stop = StopFlag()
    assert pipeline.run_stages(config, "demo", [], stop) == EXIT_STOPPED
    assert done == ["data prepare"]
    assert "[2/2] train: not begun; run the same command again to continue" in capfd.readouterr().err
    # After the last stage there is nothing left to continue.
    stop.reason = None
    assert pipeline.run_stages(config, "demo", [], stop) == EXIT_DONE


@pytest.mark.multiprocess
def test_an_experiment_hands_a_stop_on(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "DISTLM_TESTS_WARM"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    run = tmp_path / "run"
    item = Item("one", "run", "demo", run, tuple(settings(text, run, "launch.ranks=1")), ())
    after = Item("two", "run", "demo", run, item.settings, ("one",))
    experiment = Experiment("x", "title", tmp_path, "distlm.analysis.papers.pkm_plm", (item, after), "distlm x")

    def look(_seconds: float) -> None:
        if list(run.glob("checkpoints/step-*")):
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    monkeypatch.setattr(reproduce.time, "sleep", look)
    try:
        assert reproduce.run_experiment(experiment) == EXIT_STOPPED
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "train: stopped after update" in (run / "logs" / "train.log").read_text("utf-8")
