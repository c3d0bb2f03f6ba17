"""Progress of long work: a rich bar on a terminal, plain grep-able rank-tagged lines otherwise."""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from distlm.runtime.metrics import (
    PROGRESS_DONE,
    PROGRESS_ETA,
    PROGRESS_RATE,
    PROGRESS_TOTAL,
    PROGRESS_UNIT,
    MetricsFile,
)
from distlm.system_errors import reason

if TYPE_CHECKING:
    # Imported where a bar is shown: without a terminal there is none.
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

EVERY_S = 5.0
"""Plain lines are written so often, and one at the end."""
EVERY_VARIABLE = "DISTLM_PROGRESS_S"
"""Environment variable with another number of seconds, for a stage whose lines are shown as a bar."""
_LIVE_EVERY_S = 0.5
RECORD_EVERY_S = 30.0
"""Progress goes into metrics.jsonl at most so often, and once at the end."""
_record: ContextVar[MetricsFile | None] = ContextVar("progress record", default=None)


@contextmanager
def record_progress(metrics: MetricsFile | None) -> Iterator[None]:
    """For the block, every Progress of this process also writes to `metrics`, so that others can see how far it is."""
    token = _record.set(metrics)
    try:
        yield
    finally:
        _record.reset(token)


class Progress:
    """Counts units of one stage and shows rate and time left. Only rank 0 shows a bar; in plain mode rank 0 writes.

    with Progress("datastore write", total=rows, unit="rows", rank=comm.rank) as progress:
        progress.advance(1000, loss="3.21")
    """

    def __init__(
        self, label: str, total: int, unit: str, rank: int = 0, every_s: float | None = None, done: int = 0
    ) -> None:
        """`every_s`: seconds between plain lines; None: as the environment says, else EVERY_S."""
        self.label, self.total, self.unit, self.rank = label, total, unit, rank
        self.every_s = float(os.environ.get(EVERY_VARIABLE, EVERY_S)) if every_s is None else every_s
        self.done, self._first = done, done
        self._bar: RichProgress | None = None

    def __enter__(self) -> "Progress":
        self._start = self._last = time.monotonic()
        self._recorded = self._start - RECORD_EVERY_S
        if self.rank == 0 and _live():
            self._bar = _bar()
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def advance(self, count: int = 1, **fields: object) -> None:
        """`count` more units are done; `fields` are shown as key=value."""
        self.done += count
        if self.rank != 0:
            return
        now = time.monotonic()
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        self._write_record(now, rate, left)
        note = " ".join(f"{key}={value}" for key, value in fields.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        if now - self._last >= self.every_s or self.done >= self.total:
            self._last = now
            print(self._line(rate, left, note), file=sys.stderr, flush=True)

    def _line(self, rate: float, left: float, note: str) -> str:
        """What `Output` reads again."""
        percent = 100 * self.done / max(self.total, 1)
        return (
            f"[rank {self.rank}] {self.label}: {self.done}/{self.total} {self.unit} ({percent:.0f}%) {note}"
            f"{' ' if note else ''}rate={rate:.3g}/s eta={format_seconds(left)}"
        )

    def _write_record(self, now: float, rate: float, left: float) -> None:
        record = _record.get()
        if record is None or (now - self._recorded < RECORD_EVERY_S and self.done < self.total):
            return
        self._recorded = now
        values = {PROGRESS_DONE: self.done, PROGRESS_TOTAL: self.total, PROGRESS_UNIT: self.unit}
        eta = None if left == float("inf") else round(left, 1)
        record.write(self.label, {**values, PROGRESS_RATE: round(rate, 3), PROGRESS_ETA: eta})

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


_LINE = re.compile(
    r"\[rank 0\] (?P<label>[^:]+): (?P<done>\d+)/(?P<total>\d+) \S+ \(\d+%\) (?P<note>.*?) ?rate=\S+/s eta=\S+"
)
"""A plain line of a Progress."""


class Output:
    """The output of a started stage: on a terminal its plain progress lines become one bar; `log` gets the lines.

    Its standard error is a pipe, so that it writes plain lines itself. `log` has no buffer. What cannot be written to
    it is lost, which is said once: no work is worth less without its log.
    """

    def __init__(self, log: BinaryIO) -> None:
        self._log, self._logged, self._lost = log, 0.0, False

    def __enter__(self) -> "Output":
        self._bar: RichProgress | None = None
        self._task: tuple[str, TaskID] | None = None
        if sys.stdout.isatty() and _live():
            self._bar = _bar()
            self._bar.start()
        return self

    @property
    def environment(self) -> dict[str, str]:
        """What the stage needs so that the bar moves."""
        return {EVERY_VARIABLE: str(_LIVE_EVERY_S)} if self._bar is not None else {}

    def keep(self, line: str) -> None:
        """Write a line to the log alone."""
        try:
            self._log.write(line.encode("utf-8", "replace"))
        except OSError as error:
            if not self._lost:
                name = getattr(self._log, "name", "log")
                print(f"{name}: {reason(error)[0]}: the work goes on, its log has gaps", file=sys.stderr)
            self._lost = True

    def write(self, line: str) -> None:
        """A line, its end included."""
        found = _LINE.fullmatch(line.rstrip("\n")) if self._bar is not None else None
        label, done, total = (found["label"], int(found["done"]), int(found["total"])) if found else ("", 0, 0)
        under_way = done < total
        now = time.monotonic()
        # A log has as many lines as without a terminal.
        if not under_way or now - self._logged >= EVERY_S:
            self._logged = now if under_way else self._logged
            self.keep(line)
        if self._bar is None:
            sys.stdout.write(line)
            sys.stdout.flush()
            return
        if self._task is not None and found and (not under_way or label != self._task[0]):
            self._bar.remove_task(self._task[1])
            self._task = None
        if not under_way:
            # The last line of a finished count stays on the terminal.
            self._bar.console.print(line.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
            return
        assert found is not None
        if self._task is None:
            self._task = (label, self._bar.add_task(label, total=total, completed=done, note=found["note"]))
        self._bar.update(self._task[1], completed=done, total=total, note=found["note"])

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task[1])
            self._bar.stop()


def _live() -> bool:
    """Whether there is a terminal that can show a bar."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _bar() -> "RichProgress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(), console=Console(stderr=True),
        # Output that goes into a file must stay there while a bar is shown on the terminal.
        redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip


def say(message: str, rank: int = 0) -> None:
    """One line on standard error from rank 0; nothing from the others."""
    if rank == 0:
        print(message, file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """3725 → '1h02m'; 65 → '1m05s'."""
    if seconds == float("inf"):
        return "?"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
