"""Parquet files: a column of text, read by row groups."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from msgspec import structs

from distlm.data.shards.records import TextFacts
from distlm.data.text.rows import TableSource
from distlm.data.text.stream import sha256_of
from distlm.errors import DistlmError
from distlm.system_errors import refuse

_BATCH = 1000
"""Rows read at once."""


class ParquetSource(TableSource):
    """One file. Rows are read forwards from where the last ones ended, as far as they lie behind."""

    def __init__(self, path: Path, name: str, setting: str, field: str, whole: bool, one_line: bool) -> None:
        """`setting`: name of the setting that has the column's name."""
        self.path, self._setting, self._field = path, setting, field
        facts = TextFacts(name=name, field=field, sha256="", text=0)
        super().__init__(facts, str(path), 0, self._values, whole, one_line)
        self._cursor: Iterator[Any] | None = None
        self._at = 0

    def checked_rows(self) -> Iterator[Any]:
        self._count = self._ends[-1] if self._ends else 0
        return super().checked_rows()

    def facts(self, rows: int, text: int, sha256: str) -> TextFacts:
        size = self.path.stat().st_size
        return structs.replace(super().facts(rows, text, sha256), bytes=size, sha256=sha256_of(self.path))

    def close(self) -> None:
        self._cursor = None
        if opened := self.__dict__.pop("_file", None):
            opened.close()

    def start(self, size: int) -> tuple[str, float]:
        """Texts of the first rows, of about `size` bytes at most, each with a newline; bytes that all of them have."""
        rows = self._ends[-1] if self._ends else 0
        text = "".join(f"{row}\n" for row in self.rows(0, min(rows, _BATCH)))
        self.close()
        if rows <= _BATCH:
            return text, len(text.encode())
        column = next(number for number, name in enumerate(self._columns) if name == self._field)
        metadata = self._file.metadata
        groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
        stored = sum(group.column(column).total_uncompressed_size for group in groups)
        # Repeated rows are stored once.
        return text[:size], max(stored, len(text.encode()) * rows / _BATCH)

    @cached_property
    def _file(self) -> Any:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise DistlmError(f"{self.path}: .parquet files need pyarrow: pip install pyarrow ({error})") from error
        with self._readable():
            found = parquet.ParquetFile(self.path)
        names = found.schema_arrow.names
        if self._field not in names:
            raise DistlmError(f"{self.path}: no column {self._setting}={self._field}; it has {', '.join(names)}")
        return found

    @property
    def _columns(self) -> list[str]:
        """Path of each column in the file; those of nested ones have points in them."""
        schema = self._file.schema
        return [schema.column(number).path for number in range(len(schema.names))]

    @cached_property
    def _ends(self) -> list[int]:
        """Number of the row behind each row group."""
        metadata = self._file.metadata
        return list(accumulate(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)))

    def _values(self, start: int, end: int) -> Iterator[Any]:
        group = next((number for number, behind in enumerate(self._ends) if start < behind), len(self._ends))
        first = self._ends[group - 1] if group else 0
        if self._cursor is None or start < self._at or first > self._at:
            self._cursor, self._at = self._from(group), first
        cursor = self._cursor
        for _ in islice(cursor, start - self._at):
            pass
        for self._at, value in enumerate(islice(cursor, end - start), start + 1):
            yield value

    def _from(self, group: int) -> Iterator[Any]:
        """All values from a row group on."""
        groups = range(group, len(self._ends))
        if not groups:
            return
        with self._readable():
            for batch in self._file.iter_batches(_BATCH, row_groups=[*groups], columns=[self._field]):
                yield from batch.column(0).to_pylist()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        # The library's errors are kinds of these.
        except (OSError, ValueError) as error:
            refuse(error, self.path)
            raise DistlmError(f"{self.path}: damaged or cut .parquet file ({error}); get it again") from error
