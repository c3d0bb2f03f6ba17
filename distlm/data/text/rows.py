"""Sources whose text comes in rows: tables of a data set, articles of the demo corpus."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import structs

from distlm.data.documents import is_blank, is_title
from distlm.data.shards.records import TextFacts
from distlm.data.text.check import Spelled, check_row
from distlm.data.text.source import Cutting, Scan, Segment, Segments
from distlm.errors import DistlmError

_TOLD = 1 << 20
"""Progress is told of so many bytes at once."""


class RowSource(ABC):
    """Rows of text, each a line (or several) or a document. Subclasses say where the rows come from."""

    def __init__(self, name: str, whole: bool, one_line: bool) -> None:
        """`whole`: a row is a document; `one_line`: it then comes as one line, however many it holds."""
        self.name, self._whole, self._one_line = name, whole, one_line

    def rule(self, rule: str) -> str:
        return "line" if self._whole or rule == "whole" else rule

    def scan(self, number: int, cutting: Cutting, check: Callable[[int], None]) -> Scan:
        spelled, found = Spelled(cutting.specials), Segments(number, self.name, cutting)
        rule, least = cutting.rule, cutting.shortest
        rows = lines = size = 0
        # The row before last, the last one, and where this begins and the next does.
        before, line, line_start, start = "", "", 0, 0
        digest, total = hashlib.sha256(), 0
        for place, end, text in self.checked_rows():
            check_row(text, place)
            spelled.add(text)
            # The cut, if any, is between `line` and this row or, for a title, one earlier.
            ends = {
                "line": rows > 0,
                "blank_line": rows > 0 and is_blank(line),
                "title": rows > 1 and is_blank(before) and is_title(line, text),
            }[rule]
            here, over = (line_start, _bytes(line)) if rule == "title" else (start, 0)
            if ends and size - over >= least:
                found.add(here, size - over)
                size = over
            data = text.encode()
            digest.update(data + b"\n")
            size, total = size + len(data) + 1, total + len(data) + 1
            rows, lines = rows + 1, lines + 1 + text.count("\n")
            before, line, line_start, start = line, text, start, end
            check(len(data) + 1)
        if rows and start > found.end:
            found.add(start, size)
        return found.scan(self.facts(rows, total, digest.hexdigest()), lines, spelled)

    def lines(self, segment: Segment, advance: Callable[[int], None]) -> Iterator[str]:
        waiting = 0
        for text in self.rows(segment.start, segment.end):
            yield from [text.replace("\n", " ")] if self._whole and self._one_line else text.split("\n")
            waiting += _bytes(text)
            if waiting > _TOLD:
                advance(waiting)
                waiting = 0
        advance(waiting)

    @abstractmethod
    def checked_rows(self) -> Iterator[tuple[Callable[[], str], int, str]]:
        """(what errors call it, where the row behind it begins, text) of all rows, for the scan.

        Raises DistlmError naming the row that is not text.
        """

    def places(self) -> Iterator[tuple[Callable[[], str], str]]:
        return ((place, text) for place, _, text in self.checked_rows())

    @abstractmethod
    def rows(self, start: int, end: int) -> Iterator[str]:
        """The rows from one place to another."""

    @abstractmethod
    def facts(self, rows: int, text: int, sha256: str) -> TextFacts:
        """Facts of what was scanned; `sha256` is the hash of the rows, a newline behind each."""

    def close(self) -> None:
        return None


class TableSource(RowSource):
    """Rows that have numbers."""

    def __init__(
        self, facts: TextFacts, place: str, count: int, read: Callable[[int, int], Iterator[Any]],
        whole: bool = False, one_line: bool = True,
    ) -> None:  # fmt: skip
        """`facts`: what is known before reading; `read` gives the rows [start, end)."""
        super().__init__(facts.name, whole, one_line)
        self._place, self._count, self._read, self._facts = place, count, read, facts

    def checked_rows(self) -> Iterator[tuple[Callable[[], str], int, str]]:
        for number, text in enumerate(self.rows(0, self._count), 1):
            yield lambda number=number: f"{self._place}, row {number}", number, text  # type: ignore[misc]

    def rows(self, start: int, end: int) -> Iterator[str]:
        for number, text in enumerate(self._read(start, end), start + 1):
            if not isinstance(text, str):
                column = f"column {self._facts.field} " if self._facts.field else ""
                raise DistlmError(f"{self._place}, row {number}: {column}holds {text!r}, expected text")
            yield text.removesuffix("\n")

    def facts(self, rows: int, text: int, sha256: str) -> TextFacts:
        return structs.replace(self._facts, rows=rows, sha256=sha256, text=text)


def _bytes(line: str) -> int:
    return len(line.encode()) + 1
