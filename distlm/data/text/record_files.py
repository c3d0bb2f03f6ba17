"""Files of records, one with a field of text each: .jsonl and .csv, also compressed. Places are bytes, as in a text."""

import csv
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from distlm.data.shards.records import TextFacts
from distlm.data.text.check import Spelled, TextCheck
from distlm.data.text.rows import RowSource
from distlm.data.text.source import changed
from distlm.data.text.stream import TextStream, whole_lines
from distlm.errors import DistlmError

_LONGEST_FIELD = 1 << 28
"""Bytes of a field of .csv: so much is read before a quotation mark without its second is noticed."""


class _Lines:
    """Lines of some bytes, with their ends; counts what it gave."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self.bytes, self.count = pieces, 0, 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            for line in piece.removesuffix(b"\n").split(b"\n"):
                self.count += 1
                self.bytes += len(line) + 1
                yield line


class _RecordFile(RowSource):
    """What both formats share."""

    def __init__(self, path: Path, name: str, setting: str, field: str, whole: bool, one_line: bool) -> None:
        """`setting`: name of the setting that has the field's name."""
        super().__init__(name, whole, one_line)
        self.path, self._setting, self._field = path, setting, field
        self.stream = TextStream(path)

    def checked_rows(self) -> Iterator[tuple[Callable[[], str], int, str]]:
        # Of the words only those in the field of text count.
        looked = TextCheck(self.path, Spelled(), words=False)

        def blocks() -> Iterator[bytes]:
            for block in self.stream.blocks():
                looked.add(block)
                yield block
            looked.add(b"", last=True)

        lines = _Lines(whole_lines(blocks()))
        try:
            for text in self._texts(lines, 0):
                yield lambda line=lines.count: f"{self.path}, line {line}", lines.bytes, text  # type: ignore[misc]
        except (ValueError, csv.Error) as error:
            raise DistlmError(f"{self.path}, line {lines.count}: {error}") from error

    def rows(self, start: int, end: int) -> Iterator[str]:
        lines = _Lines(whole_lines(self.stream.part(start, end - start)))
        try:
            yield from self._texts(lines, start)
        except (ValueError, csv.Error) as error:
            raise changed(self.path) from error
        if lines.bytes < end - start:
            raise changed(self.path)

    def start(self, size: int) -> tuple[str, int]:
        """Texts of the rows in the first bytes, each with a newline, and how many bytes these rows have.

        Raises DistlmError for a row without the field.
        """
        # A last line that is cut could pass for a shorter record.
        lines = _Lines(piece for piece in whole_lines(self.stream.part(0, size)) if piece.endswith(b"\n"))
        texts, read = [], 0
        try:
            for text in self._texts(lines, 0):
                texts.append(text + "\n")
                read = lines.bytes
        except csv.Error:
            # The last row is cut, or else the scan will say so.
            pass
        except ValueError as error:
            raise DistlmError(f"{self.path}, line {lines.count}: {error}") from error
        return "".join(texts), read

    def facts(self, rows: int, text: int, sha256: str) -> TextFacts:
        return TextFacts(
            name=self.name, bytes=self.path.stat().st_size, field=self._field, sha256=self.stream.sha256, rows=rows,
            text=text,
        )  # fmt: skip

    def close(self) -> None:
        self.stream.close()

    @abstractmethod
    def _texts(self, lines: _Lines, start: int) -> Iterator[str]:
        """The field of each record. Raises ValueError or csv.Error for one that has none."""


class JsonlSource(_RecordFile):
    """One JSON object a line."""

    @cached_property
    def _decoder(self) -> Any:
        return msgspec.json.Decoder(
            msgspec.defstruct("Row", [("text", str, msgspec.field(name=self._field))], forbid_unknown_fields=False)
        )

    def _texts(self, lines: _Lines, start: int) -> Iterator[str]:
        for line in lines:
            if not line.strip():
                continue
            try:
                text = self._decoder.decode(line).text
            except msgspec.DecodeError as error:
                raise ValueError(self._problem(line, error)) from error
            yield text.removesuffix("\n")

    def _problem(self, line: bytes, error: Exception) -> str:
        try:
            row = msgspec.json.decode(line)
        except msgspec.DecodeError:
            return f"not a JSON object ({error}); .jsonl has one a line"
        if not isinstance(row, dict):
            return f"not a JSON object ({error})"
        if self._field not in row:
            return f"no field {self._setting}={self._field}; it has {', '.join(row)}"
        return f"{self._setting}={self._field} holds {row[self._field]!r}, expected text"


class CsvSource(_RecordFile):
    """Comma-separated values, quoted where they need it; the first line names the columns."""

    def _texts(self, lines: _Lines, start: int) -> Iterator[str]:
        csv.field_size_limit(_LONGEST_FIELD)
        # Without the newline a quoted field would lose its own.
        rows = csv.reader((line.decode("utf-8") + "\n" for line in lines), strict=True)
        for row in islice(rows, 1 if start == 0 else 0, None):
            if not row:
                continue
            if len(row) <= self._column:
                raise ValueError(f"{len(row)} columns, and {self._setting}={self._field} is column {self._column + 1}")
            yield row[self._column].removesuffix("\n")

    @cached_property
    def _column(self) -> int:
        lines = _Lines(whole_lines(self._all()))
        try:
            names = next(csv.reader((line.decode("utf-8") + "\n" for line in lines), strict=True), [])
        except (ValueError, csv.Error) as error:
            raise DistlmError(f"{self.path}, line {lines.count}: {error}") from error
        if self._field not in names:
            raise DistlmError(
                f"{self.path}: no column {self._setting}={self._field}; its first line has {', '.join(names) or 'none'}"
            )
        return names.index(self._field)

    def _all(self) -> Iterator[bytes]:
        # Another stream: this one stands where rows are being read.
        stream = TextStream(self.path)
        try:
            yield from stream.blocks()
        finally:
            stream.close()
