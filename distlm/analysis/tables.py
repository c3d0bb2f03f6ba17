"""Small tables: as Markdown and HTML for people, as CSV for programs."""

import csv
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distlm.errors import DistlmError
from distlm.runtime.files import atomic_path


class NothingFinished(DistlmError):
    """No run of an experiment has results yet."""


def nothing_finished(root: Path) -> NothingFinished:
    """What there is to say then; `root`: the experiment's folder."""
    return NothingFinished(f"{root}: no run is finished yet; `distlm reproduce` without --tables makes them")


@dataclass(frozen=True)
class Cell:
    """A cell of a table in HTML."""

    text: str
    best: bool = False
    """It shows the best result of its column."""


@dataclass(frozen=True)
class Table:
    """A table in HTML (templates/table.html)."""

    head: list[str]
    rows: list[list[Cell]]

    @classmethod
    def of(
        cls, head: Sequence[str], rows: Sequence[Sequence[str]], lowest: Collection[int] = (),
        highest: Collection[int] = (),
    ) -> "Table":  # fmt: skip
        """The table of these texts. `lowest`, `highest`: numbers of the columns whose lowest or highest result is the
        best. What is equal as shown is equally good; a column with one number has no best."""
        best = {column: _best([row[column] for row in rows], min) for column in lowest}
        best |= {column: _best([row[column] for row in rows], max) for column in highest}
        return cls(list(head), [[Cell(text, text in best.get(at, ())) for at, text in enumerate(row)] for row in rows])


def _best(texts: Sequence[str], choose: Callable[[Iterable[float]], float]) -> set[str]:
    """The texts with the best number; none where fewer than two have one."""
    numbers = {text: value for text in texts if (value := _number(text)) is not None}
    if sum(text in numbers for text in texts) < 2:
        return set()
    wanted = choose(numbers.values())
    return {text for text, value in numbers.items() if value == wanted}


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%").replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide as their content; all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """One line per row; numbers with all their digits."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(head)
        writer.writerows([repr(cell) if isinstance(cell, float) else cell for cell in row] for row in rows)


def write_text(path: Path, text: str) -> None:
    """The text and a line's end."""
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def write_picture(path: Path, png: bytes) -> None:
    """A plot as a file."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png)
