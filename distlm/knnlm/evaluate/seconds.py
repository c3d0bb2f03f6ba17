"""Seconds of each stage, from metrics.jsonl."""

import json
from pathlib import Path

from distlm.runtime.metrics import STAGE_SECONDS


def stage_seconds(metrics: Path) -> dict[str, float]:
    """Stage → seconds, in order of first appearance; the starts of an interrupted stage are added up.

    Time that a killed process did not live to record is missing.
    """
    seconds: dict[str, float] = {}
    if not metrics.exists():
        return seconds
    with metrics.open(encoding="utf-8") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if STAGE_SECONDS in line:
                seconds[line["stage"]] = round(seconds.get(line["stage"], 0.0) + line[STAGE_SECONDS], 3)
    return seconds
