"""A stop signal at any moment, from the first imports on: exit code 75, and the same command ends in the same bytes.

Starts are cold here: what is stopped imports everything itself. Moments are counted from the start of the process, but
a signal waits until its process listens: before Python itself is up nothing can.
"""

import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from support import ENVIRONMENT, distlm, mpirun_command, warm
from support.deadline import DEADLINE_S, until
from support.lstm import lstm_settings
from support.shared import whole_settings
from support.train import same_end, settings, tiny_tokens

from distlm.errors import EXIT_DONE, EXIT_STOPPED
from distlm.runtime.child import listens
from distlm.runtime.rundir import RunDir

pytestmark = pytest.mark.multiprocess

SHORT = ["awd.epochs=2", "awd.finetune_epochs=0"]
LONG = ["train.updates=100", "train.save_every=0", "train.valid_every=0"]


@dataclass(frozen=True)
class Case:
    """`distlm COMMAND RECIPE` on some ranks, told to stop by a signal so many seconds after its start."""

    name: str
    moment: float
    command: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.name}-{self.moment:g}s-{self.command.replace(' ', '-')}-{self.ranks}"


CASES = [
    Case("USR2", 0.3, "train demo", 2),
    Case("TERM", 0.05, "run awd-lstm-small", 1),
]
MORE = [
    Case("USR1", 6.0, "run awd-lstm-small", 2),
    Case("INT", 0.05, "train demo", 1),
    Case("HUP", 2.5, "train demo", 2),
    Case("INT", 1.5, "run awd-lstm-small", 2),
]


def _thirty() -> list[Case]:
    """Every signal, command and number of ranks, at moments drawn once for all: from 0.05 s on, more of them early."""
    draw = random.Random(19)
    cases = []
    for command, last in (("train demo", 5.0), ("run demo", 15.0)):
        kinds = [(name, ranks) for ranks in (1, 2) for name in ("INT", "HUP", "TERM", "USR1", "USR2")]
        kinds += draw.sample(kinds, 5)
        draw.shuffle(kinds)
        for number, (name, ranks) in enumerate(kinds):
            part = (number + draw.random()) / len(kinds)
            cases.append(Case(name, round(0.05 + (last - 0.05) * part**2, 2), command, ranks))
    return cases


@dataclass
class Place:
    """Where the cases of this file run, and what undisturbed runs end in."""

    folder: Path
    whole: dict[tuple[str, int], Path]

    def words(self, case: Case, run: Path) -> list[str]:
        """The command line."""
        if case.command == "run demo":
            own = [*whole_settings(run, self.folder / "text"), f"launch.ranks={case.ranks}"]
        elif case.command == "train demo":
            own = settings(self.folder / "tokens", run, *LONG)
        else:
            own = [word for word in lstm_settings(self.folder, run, *SHORT) if not word.startswith("data.tokens_dir")]
            own += [f"data.text_dir={self.folder / 'text'}", f"launch.ranks={case.ranks}"]
        return [*case.command.split(), *own]

    def ended(self, case: Case) -> Path:
        """An undisturbed run."""
        key = (case.command, case.ranks)
        if key not in self.whole:
            run = self.folder / f"whole-{len(self.whole)}"
            distlm(*self.words(case, run), ranks=ranks_of_start(case))
            self.whole[key] = run
        return self.whole[key]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("signals")
    tiny_tokens(folder)
    # Whoever started pytest may have these ignored (a shell its background's, nohup), and what it starts would too.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield Place(folder, {})
    for number, handler in before.items():
        signal.signal(number, handler)


def ranks_of_start(case: Case) -> int:
    """`distlm run` starts its ranks itself."""
    return case.ranks if case.command.startswith("train") else 1


def rank_below(launcher: int) -> int:
    """The last rank that an mpirun has started; 0 where there is none."""
    found = 0
    for child in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.Error):
            if child.cmdline()[1:3] == ["-m", "distlm"]:
                found = child.pid
    return found


def stop(case: Case, words: list[str]) -> tuple[int, float, str]:
    """Start it cold and signal it; exit code, when the signal was sent, output."""
    process = subprocess.Popen(
        mpirun_command(ranks_of_start(case), ["-m", "distlm", *words]), env={**ENVIRONMENT, **warm.COLD},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    began = time.monotonic()
    time.sleep(case.moment)
    if process.poll() == EXIT_DONE:
        pytest.skip(f"on this machine it is done within {case.moment} s")

    def alive() -> bool:
        return process.poll() is None

    def listening() -> int:
        # Looked for anew each time: what was a rank's process a moment ago may have been the launcher's fork.
        rank = process.pid if ranks_of_start(case) == 1 else rank_below(process.pid)
        return rank if rank and listens(rank) else 0

    told = until(listening, "a rank with its handlers", alive)
    sent = time.monotonic() - began
    psutil.Process(told).send_signal(getattr(signal, f"SIG{case.name}"))
    output = process.communicate(timeout=DEADLINE_S)[0]
    return process.returncode, sent, output


def same_results(one: Path, other: Path) -> bool:
    """The last checkpoints, and whatever the runs made of them, byte for byte."""
    numbers = [
        {name: json.loads((run / name).read_text("utf-8"))["splits"] for name in ("lm.json", "results.json")
         if (run / name).exists()} for run in (one, other)
    ]  # fmt: skip
    indexes = [RunDir(run).index / "merged.index" for run in (one, other)]
    return (
        same_end(one, other)
        and numbers[0] == numbers[1]
        and (not indexes[0].exists() or indexes[0].read_bytes() == indexes[1].read_bytes())
    )


def check(case: Case, place: Place, run: Path) -> float:
    """Stopped with 75, continued to the end of the undisturbed run; when the signal was sent."""
    words = place.words(case, run)
    code, sent, output = stop(case, words)
    assert code == EXIT_STOPPED, output
    assert "Traceback" not in output, output
    distlm(*words, ranks=ranks_of_start(case))
    assert same_results(place.ended(case), run)
    return sent


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str)
def test_a_signal_at_any_moment_stops_with_75(case: Case, place: Place, tmp_path: Path) -> None:
    check(case, place, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("case", _thirty(), ids=str)
def test_thirty_signals(case: Case, place: Place, tmp_path: Path) -> None:
    """The same at thirty moments of training alone and of the whole run; `-s` shows the table."""
    sent = check(case, place, tmp_path / "run")
    print(f"\n| {case.name} | {case.moment} s, sent at {sent:.2f} s | {case.command} | {case.ranks} | {EXIT_STOPPED} |")
