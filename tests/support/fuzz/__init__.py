"""Commands in this process with input that nobody means, and what must hold of each: manners."""

import contextlib
import io
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, Phase, settings

from distlm.cli import main

STUCK_S = 120
"""A command on tiny input that takes so long waits for something that will not come."""


def times(examples: int) -> settings:
    """Always the same examples, no shrinking: each is a handful of words already, and costs a run of a command."""
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    words: tuple[str, ...]
    code: object
    output: str
    errors: str

    @property
    def told(self) -> list[str]:
        """Its errors, a line each."""
        return [line for line in self.errors.splitlines() if "distlm: " in line]

    def __str__(self) -> str:
        return f"distlm {' '.join(map(ascii, self.words))[:600]}\nexit {self.code}\n{self.errors[-3000:]}"


def command(*words: object) -> Outcome:
    """`distlm WORDS` in this process."""
    given = tuple(map(str, words))
    code: object = "none"
    output, errors = _stream(), _stream()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            with _not_for_ever(), _environment_kept():
                main(given)
        except SystemExit as end:
            code = end.code
        except BaseException:
            errors.write(traceback.format_exc())
    return Outcome(given, code, _text(output), _text(errors))


def _stream() -> io.TextIOWrapper:
    """As a process has it: a text without a UTF-8 is an error where it is printed."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode("utf-8", "backslashreplace")


def has_manners(outcome: Outcome, named: Sequence[str] = (), stopped: bool = False) -> None:
    """Done, or one error without a traceback; one of usage names one of `named`, where there are any.

    `stopped`: 75 will do, too.
    """
    assert outcome.code in (0, 1, 2, *([75] if stopped else [])), outcome
    assert "Traceback" not in outcome.errors, outcome
    # A check of files lists what it finds; argparse ends with its usage and an error of its own.
    found = len(outcome.told) or outcome.errors.count("FAIL ") or outcome.errors.count(": error: ")
    assert bool(found) == bool(outcome.code) and len(outcome.told) <= 1, outcome
    if outcome.code == 2 and named:
        assert any(name in outcome.errors for name in named), (named, outcome)


@contextlib.contextmanager
def _not_for_ever() -> Iterator[None]:
    """A command that hangs (a pipe that nobody writes to) becomes an error with the place where it does."""

    def stuck(_number: int, _frame: FrameType | None) -> None:
        raise RuntimeError(f"still at it after {STUCK_S} s")

    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(STUCK_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """Threads per rank and the like are set for the process that a command has to itself."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Relative paths are below a folder for the block."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
