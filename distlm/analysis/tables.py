"""Small tables: as Markdown for people, as CSV for programs."""

import csv
from collections.abc import Sequence
from pathlib import Path

from distlm.errors import DistlmError
from distlm.runtime.files import atomic_path


class NothingFinished(DistlmError):
    """No run of an experiment has results yet."""


def nothing_finished(root: Path) -> NothingFinished:
    """What there is to say then; `root`: the experiment's folder."""
    return NothingFinished(f"{root}: no run is finished yet; `distlm reproduce` without --tables makes them")


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
