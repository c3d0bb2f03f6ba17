"""Processor time of the runs of an experiment, as `distlm reproduce` has recorded it start by start."""

from pathlib import Path

from distlm.analysis.results.from_csv import figure, lines_of
from distlm.analysis.results.records import ResultRow
from distlm.analysis.tables import write_csv
from distlm.runtime import metrics
from distlm.runtime.rundir import RunDir

PROCESSOR_TABLE = "processor.csv"
"""In the experiment's folder."""


def write_processor_time(root: Path) -> None:
    """Write processor.csv: of every run in `root` the seconds of all its commands and starts, user and system time of
    all processes. Starts that a kill ended have left no record, nor has what was started without `distlm reproduce`.
    """
    rows = []
    for folder in sorted(path.parent for path in root.glob("*/metrics.jsonl")):
        found = [line.number(metrics.PROCESSOR_SECONDS) for line in RunDir(folder).metrics.read()]
        if known := [seconds for seconds in found if seconds is not None]:
            rows.append([folder.name, round(sum(known), 3)])
    if rows:
        write_csv(root / PROCESSOR_TABLE, ["run", "processor_seconds"], rows)


def processor_rows(root: Path) -> list[ResultRow]:
    """The line of a record that states all of it; none where nothing is recorded."""
    seconds = [float(line["processor_seconds"]) for line in lines_of(root / PROCESSOR_TABLE)]
    words = f"processor time of {len(seconds)} runs, user and system"
    return [ResultRow(words, figure("{:.2f} hours", round(sum(seconds) / 3600, 6)), 0)] if seconds else []
