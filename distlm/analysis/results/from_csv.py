"""Figures that an experiment has written as CSV, read again for its record."""

import csv
from pathlib import Path

from distlm.analysis.results.records import Figure, Number, ResultColumn, ResultTable


def lines_of(path: Path) -> list[dict[str, str]]:
    """A dict for each line, by the names of the columns; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def table_of(path: Path, title: str) -> ResultTable:
    """All of a file; an empty cell is null."""
    with path.open(encoding="utf-8", newline="") as stream:
        head, *rows = csv.reader(stream)
    return ResultTable(title, [ResultColumn(name) for name in head], [[_cell(cell) for cell in row] for row in rows])


def figure(shown: str, *numbers: Number) -> Figure:
    """Numbers and how they are shown."""
    return Figure(shown, list(numbers))


def percent(share: str | float) -> float:
    """A share in %, without the last bits of the product."""
    return round(100 * float(share), 6)


def _cell(text: str) -> str | Number | None:
    if not text:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
