"""results.json of an experiment: what it measured, how, and what that says of the paper's findings."""

import string
from typing import Literal

from msgspec import UNSET, UnsetType

from distlm.runtime.records import Part, Record, all_or_none

ResultsPath = Literal[
    "kNN-LM", "Regularised training", "Memory in masked models", "Memory in causal models", "AWD-LSTM", "Index",
    "Speed", "Scale and failures",
]  # fmt: skip
"""The sections of docs/results.md, in their order."""
Verdict = Literal["appears", "does not appear", "cannot be said"]
Number = int | float


class Figure(Part):
    """Numbers, and how they are shown."""

    shown: str
    """Text with a place for each number as in Python's str.format: `{:.2f} → {:.2f}`."""
    numbers: list[Number]
    """As they were measured, for the places in their order."""

    def text(self) -> str:
        """As it is shown. Raises ValueError when places and numbers do not fit each other."""
        places = sum(field is not None for _, field, _, _ in string.Formatter().parse(self.shown))
        if places != len(self.numbers):
            raise ValueError(f"{self.shown!r} has {places} places for {len(self.numbers)} numbers")
        return self.shown.format(*self.numbers)


class ResultRow(Part):
    """A line of docs/results.md."""

    what: str
    """What was measured, and of what."""
    ours: Figure
    """What this experiment found."""
    command: int
    """Which of the experiment's commands gives it, from 0."""
    paper: Figure | UnsetType = UNSET
    """The paper's own figures for the same; absent where it has none."""
    finding: str | UnsetType = UNSET
    """What the paper says; absent where it says nothing of the kind."""
    verdict: Verdict | UnsetType = UNSET
    """Whether that is seen in ours; absent without a finding."""

    def __post_init__(self) -> None:
        all_or_none(self, "finding", "verdict")


class ResultColumn(Part):
    """A column of a table."""

    name: str
    """Its head, with the unit."""
    shown: str = ""
    """How its numbers are shown, as behind the colon in Python's str.format: `.2f`; empty: as they are."""


class ResultTable(Part):
    """All figures of one kind, of which docs/results.md has the chief ones."""

    title: str
    """What it is of."""
    columns: list[ResultColumn]
    """From left to right."""
    rows: list[list[str | Number | None]]
    """A cell for each column; null: not measured."""


class ExperimentResults(Record):
    """What one experiment measured. docs/results.md is made of all of them (`python -m distlm.results_page`)."""

    FILE = "results/NAME.json, EXPERIMENT/results.json"
    WHAT = "record of results"
    WRITER = "distlm reproduce"
    READERS = ("python -m distlm.results_page",)
    MEND = "write it again with `distlm reproduce EXPERIMENT --tables`"

    title: str
    """What was measured, in a few words."""
    path: ResultsPath
    """The section of docs/results.md that it belongs to."""
    date: str
    """Day of the measurement, YYYY-MM-DD."""
    machine: str
    """Kind of machine: processor, cores, GPU."""
    commit: str | None
    """Commit of the code (`git describe --always --dirty`); null: not known."""
    commands: list[str]
    """What a user types to measure it again; paths of data begin with /path/to/."""
    settings: list[str]
    """What decides the figures and is not in the commands, in words."""
    rows: list[ResultRow]
    """The chief figures."""
    tables: list[ResultTable]
    """All figures."""
    notes: list[str]
    """Limits of what the figures say, in words."""
