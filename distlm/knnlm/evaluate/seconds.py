"""Seconds of each stage, from metrics.jsonl."""

from pathlib import Path

from distlm.runtime.metrics import STAGE_SECONDS, line_of


def stage_seconds(metrics: Path) -> dict[str, float]:
    """Stage → seconds, in order of first appearance; the starts of an interrupted stage are added up.

    Time that a killed process did not live to record is missing.
    """
    seconds: dict[str, float] = {}
    if not metrics.exists():
        return seconds
    with metrics.open(encoding="utf-8") as stream:
        for text in stream:
            if (line := line_of(text)) and (took := line.number(STAGE_SECONDS)) is not None:
                seconds[line.stage] = round(seconds.get(line.stage, 0.0) + took, 3)
    return seconds
