"""metrics.jsonl: the record of a run, one flushed line per event; every other view is derived from it."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TRAIN_LOSS, TRAIN_PENALTY, TRAIN_NORM = "train/loss", "train/l2_penalty", "train/tap_norm"
LEARNING_RATE, GRADIENT_NORM, LOSS_SCALE = "train/lr", "train/grad_norm", "train/loss_scale"
VALID_LOSS, VALID_PPL = "valid/loss", "valid/ppl"
TOKENS_PER_S = "perf/tokens_per_s"
STAGE_SECONDS = "stage/seconds"
DATA_WAIT_S = "perf/data_wait_s"
MEMORY_SENT_BYTES = "perf/memory_sent_bytes"
DATA_FINGERPRINT = "train/data_fingerprint"
PROGRESS_DONE, PROGRESS_TOTAL, PROGRESS_UNIT = "progress/done", "progress/total", "progress/unit"
PROGRESS_RATE, PROGRESS_ETA = "progress/rate", "progress/eta_s"

Values = dict[str, float | str | None]
"""Name of a metric → its value."""


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

    def read(self, stage: str) -> Iterator[dict[str, Any]]:
        """Lines of one stage in order; of two lines for the same step (after a resume) only the later one.

        A last line cut by a kill is passed over.
        """
        by_step: dict[Any, dict[str, Any]] = {}
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as stream:
            for number, text in enumerate(stream):
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue
                if line.get("stage") == stage:
                    key = (line["step"], tuple(sorted(set(line) - {"time"}))) if "step" in line else number
                    by_step[key] = line
        yield from by_step.values()
