"""metrics.jsonl: the record of a run, one flushed line per event; every other view is derived from it."""

import csv
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from distlm.runtime.files import json_of, refuse_no_file, unreadable
from distlm.system_errors import reason

TRAIN_LOSS, TRAIN_PENALTY, TRAIN_NORM = "train/loss", "train/l2_penalty", "train/tap_norm"
LEARNING_RATE, GRADIENT_NORM, LOSS_SCALE = "train/lr", "train/grad_norm", "train/loss_scale"
VALID_LOSS, VALID_PPL = "valid/loss", "valid/ppl"
TOKENS_PER_S = "perf/tokens_per_s"
STAGE_SECONDS = "stage/seconds"
START_SECONDS = "stage/start_seconds"
"""Of these, before the first unit of work: the model is built, its engine made."""
PROCESSOR_SECONDS = "stage/processor_s"
"""User and system time of all processes of a command."""
QUESTION = "question"
"""Label of the question that a search answered."""
DATA_WAIT_S = "perf/data_wait_s"
VALID_S, SAVE_S = "perf/valid_s", "perf/save_s"
"""One validation during training and one checkpoint: the rate of training leaves them out."""
MEMORY_SENT_BYTES = "perf/memory_sent_bytes"
DATA_FINGERPRINT = "train/data_fingerprint"
PROGRESS_DONE, PROGRESS_TOTAL, PROGRESS_UNIT = "progress/done", "progress/total", "progress/unit"
PROGRESS_RATE, PROGRESS_ETA = "progress/rate", "progress/eta_s"

Values = dict[str, float | str | None]
"""Name of a metric → its value."""


@dataclass(frozen=True)
class Line:
    """One line of metrics.jsonl."""

    time: float
    """When it was written, Unix seconds."""
    stage: str
    step: int | None
    """The update that it is about; None: about no single one."""
    values: Values
    """What is not a number, a word or null is left out."""

    def number(self, name: str) -> float | None:
        """The value of a metric; None where the line has none, or no number."""
        value = self.values.get(name)
        return value if isinstance(value, int | float) else None


def line_of(text: str | bytes) -> Line | None:
    """A line as it was written; None for one that is cut, or no line of metrics."""
    try:
        tree = json_of(text)
        when, stage, step = tree.pop("time"), tree.pop("stage"), tree.pop("step", None)
        values = {name: value for name, value in tree.items() if value is None or isinstance(value, str | int | float)}
        if not (step is None or type(step) is int):
            return None
        return Line(float(when), str(stage), step, values)
    except (ValueError, AttributeError, KeyError, TypeError):
        return None


def points(lines: Sequence[Line], name: str) -> list[tuple[int, float]]:
    """(update, value) of every line that has the metric, by rising update."""
    found = ((line.step, line.number(name)) for line in lines)
    return sorted((step, value) for step, value in found if step is not None and value is not None)


def resolve(lines: Iterable[Line]) -> list[Line]:
    """Of two lines with the same stage, step and names (after a resume) only the later one, in the earlier's place."""
    found: dict[object, Line] = {}
    for number, line in enumerate(lines):
        found[number if line.step is None else (line.stage, line.step, names_of(line))] = line
    return list(found.values())


def names_of(line: Line) -> tuple[str, ...]:
    """Names of its values, sorted."""
    return tuple(sorted(line.values))


def write_csv(lines: Iterable[Line], stream: TextIO) -> None:
    """A header and one row for each value: time in Unix seconds, stage, step (empty: of no update), name, value."""
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(("time", "stage", "step", "name", "value"))
    for line in lines:
        rows.writerows((line.time, line.stage, line.step, name, value) for name, value in line.values.items())


def metrics_table(lines: Iterable[Line]) -> str:
    """Of each stage's metrics: how many values, the step of the last one, and the last one."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        for name in line.values:
            found.setdefault((line.stage, name), []).append(line)
    stages, names = (max((len(key[part]) for key in found), default=0) + 2 for part in (0, 1))
    rows = [f"{'stage':<{stages}}{'metric':<{names}}{'values':>8}{'step':>10}  last value"]
    for (stage, name), of in found.items():
        last = max(of, key=lambda line: -1 if line.step is None else line.step) if of[-1].step is not None else of[-1]
        step, value = "" if last.step is None else last.step, last.values[name]
        shown = f"{value:.6g}" if isinstance(value, float) else value
        rows.append(f"{stage:<{stages}}{name:<{names}}{len(of):>8}{step:>10}  {shown}")
    return "\n".join(rows)


_followers: ContextVar[tuple[Callable[[Path], None], ...]] = ContextVar("followers of metrics", default=())


@contextmanager
def followed(told: Callable[[Path], None]) -> Iterator[None]:
    """For the block, `told` is called with the path of a record after each line that this thread writes to one."""
    token = _followers.set((*_followers.get(), told))
    try:
        yield
    finally:
        _followers.reset(token)


_lost: Counter[Path] = Counter()
"""Record → lines that could not be written to it since its owner was last told how many."""


class MetricsFile:
    """Appends to metrics.jsonl. Write on rank 0 only. Losses are nats per token."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, stage: str, values: Mapping[str, object], step: int | None = None) -> None:
        """One line: time (Unix seconds), stage, step if any, and the values.

        No work is worth less without its record: a line that cannot be written is lost, which is said once, and how
        many were lost by `say_lost`, or before the next one that can be written.
        """
        line: dict[str, object] = {"time": round(time.time(), 3), "stage": stage}
        if step is not None:
            line["step"] = step
        # JSON has no NaN: a figure that is none is null, as where there is none.
        figures = {name: None if unreadable(value) else value for name, value in values.items()}
        text = json.dumps({**line, **figures}) + "\n"
        try:
            with self.path.open("a+b") as stream:
                # A kill or a full disk may have left half a line, which would take this one with it.
                stream.write((b"\n" if _is_torn(stream) else b"") + text.encode())
        except OSError as error:
            _lost[self.path] += 1
            if _lost[self.path] == 1:
                why = reason(error, self.path)[0]
                print(f"{self.path}: {why}: the work goes on, its metrics are lost while that lasts", file=sys.stderr)
            return
        self.say_lost()
        for told in _followers.get():
            told(self.path)

    def say_lost(self) -> None:
        """Say how many lines were lost since this was last said, if any."""
        if count := _lost.pop(self.path, 0):
            print(f"{self.path}: {count} line{'s' * (count > 1)} of metrics could not be written", file=sys.stderr)

    def read(self, stage: str | None = None) -> Iterator[Line]:
        """Lines of one stage (None: of all) in order, resolved: of two for the same step only the later one.

        A last line cut by a kill is passed over.
        """
        yield from resolve(line for line in self._lines() if stage in (None, line.stage))

    def _lines(self) -> Iterator[Line]:
        if not self.path.exists():
            return
        refuse_no_file(self.path, "the record of a run")
        with self.path.open("rb") as stream:
            for text in stream:
                line = line_of(text)
                if line is not None:
                    yield line


def _is_torn(stream: BinaryIO) -> bool:
    """Whether a file ends within a line."""
    if not stream.seek(0, os.SEEK_END):
        return False
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) != b"\n"
