"""metrics.jsonl: the record of a run, one flushed line per event; every other view is derived from it."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TRAIN_LOSS, TRAIN_PENALTY, TRAIN_NORM = "train/loss", "train/l2_penalty", "train/tap_norm"
LEARNING_RATE, GRADIENT_NORM, LOSS_SCALE = "train/lr", "train/grad_norm", "train/loss_scale"
VALID_LOSS, VALID_PPL = "valid/loss", "valid/ppl"
TOKENS_PER_S = "perf/tokens_per_s"
STAGE_SECONDS = "stage/seconds"
QUESTION = "question"
"""Label of the question that a search answered."""
DATA_WAIT_S = "perf/data_wait_s"
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
        tree = json.loads(text)
        when, stage, step = tree.pop("time"), tree.pop("stage"), tree.pop("step", None)
        values = {name: value for name, value in tree.items() if value is None or isinstance(value, str | int | float)}
        return Line(float(when), str(stage), step, values)
    except (ValueError, AttributeError, KeyError, TypeError):
        return None


def points(lines: Sequence[Line], name: str) -> list[tuple[int, float]]:
    """(update, value) of every line that has the metric, by rising update."""
    found = ((line.step, line.number(name)) for line in lines)
    return sorted((step, value) for step, value in found if step is not None and value is not None)


class MetricsFile:
    """Appends to metrics.jsonl. Write on rank 0 only. Losses are nats per token."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, stage: str, values: Mapping[str, object], step: int | None = None) -> None:
        """One line: time (Unix seconds), stage, step if any, and the values."""
        line: dict[str, object] = {"time": round(time.time(), 3), "stage": stage}
        if step is not None:
            line["step"] = step
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**line, **values}) + "\n")

    def read(self, stage: str) -> Iterator[Line]:
        """Lines of one stage in order; of two lines for the same step (after a resume) only the later one.

        A last line cut by a kill is passed over.
        """
        by_step: dict[object, Line] = {}
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as stream:
            for number, text in enumerate(stream):
                line = line_of(text)
                if line is not None and line.stage == stage:
                    key = number if line.step is None else (line.step, tuple(sorted(line.values)))
                    by_step[key] = line
        yield from by_step.values()
