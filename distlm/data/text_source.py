"""Where the text of the shards comes from: files, compressed or not, tables of a hub data set, the demo corpus."""

import codecs
import gzip
import hashlib
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from msgspec import structs

from distlm.data.corpus import hub_label, hub_tables
from distlm.data.documents import cuts, is_blank, is_title
from distlm.data.shards.config import ShardsConfig
from distlm.data.shards.records import TextFacts
from distlm.errors import DistlmError, UsageError
from distlm.runtime.progress import say

SUFFIXES = (".txt", ".txt.xz", ".txt.gz")
_BLOCK = 1 << 20
_TITLE_OF_DEMO = re.compile(r" = [^=].* = ")


@dataclass(frozen=True)
class Segment:
    """Consecutive documents of one source: bytes of its unpacked text, or rows of its table, [start, end)."""

    source: int
    """Number of the source in its split."""
    start: int
    end: int
    bytes: int
    """Of UTF-8 text."""


@dataclass(frozen=True)
class Scan:
    """What one look at a source found: facts for the manifest, and where it can be cut."""

    facts: TextFacts
    segments: list[Segment]


class Source(Protocol):
    """One file or table of a split."""

    name: str
    """In the manifest: relative to the text's folder."""

    def scan(self, number: int, rule: str, at_least: int, check: Callable[[int], None]) -> Scan:
        """Read it all, once: `check` is told bytes of text read. Raises DistlmError for text that is not UTF-8."""

    def lines(self, segment: Segment, advance: Callable[[int], None]) -> Iterator[str]:
        """Lines of a segment without their ends; segments must be asked for in order to be quick."""

    def rule(self, rule: str) -> str:
        """How these lines fall into documents (shards.documents, and what it is for this source)."""

    def close(self) -> None:
        """Let go of what reading keeps open."""


def open_sources(config: ShardsConfig) -> dict[str, list[Source]]:
    """Split → its sources, in the order of the rows. Raises DistlmError naming the setting and the mend."""
    if config.source == "folder":
        return {split: [*files] for split, files in folder_sources(config.text_dir, config.splits).items()}
    if config.source == "demo":
        return _demo_sources(config.splits)
    tables = hub_tables("shards", config.hub_name, config.hub_config, config.hub_field, config.splits)
    what = hub_label("shards", config.hub_name, config.hub_config)
    version, whole = metadata.version("datasets"), config.documents == "whole"

    def facts(split: str) -> TextFacts:
        return TextFacts(
            name=split, hub=config.hub_name, config=config.hub_config, field=config.hub_field, datasets=version,
            sha256="", text=0,
        )  # fmt: skip

    return {
        split: [TableSource(facts(split), f"{what}, {split}", len(table), _column(table, config.hub_field), whole)]
        for split, table in tables.items()
    }


def folder_sources(text_dir: str, splits: Sequence[str]) -> "dict[str, list[FileSource]]":
    """The files of each split. Raises DistlmError when a split is missing, empty, or there in two forms."""
    if not text_dir:
        raise UsageError("shards.text_dir is empty; set it to a folder with train.txt(.xz, .gz) or a folder train")
    folder = Path(text_dir)
    if not folder.is_dir():
        raise DistlmError(f"shards.text_dir={text_dir}: no such folder")
    return {split: _files_of(folder, split) for split in splits}


def _files_of(folder: Path, split: str) -> "list[FileSource]":
    names = [split + suffix for suffix in SUFFIXES] + [f"wiki.{split}.tokens", split]
    found = [name for name in names if (folder / name).is_dir() == (name == split) and (folder / name).exists()]
    if not found:
        raise DistlmError(
            f"{folder}: no text of the {split} split; put {', '.join(names[:-1])} or a folder {split} there, "
            "or leave the split out of shards.splits"
        )
    if len(found) > 1:
        raise DistlmError(f"{folder}: the {split} split is there more than once ({', '.join(found)}); leave one")
    if found != [split]:
        return [FileSource(folder / found[0], found[0])]
    inside = sorted(path for path in (folder / split).rglob("*") if path.is_file() and not path.name.startswith("."))
    texts = [path for path in inside if path.name.endswith(SUFFIXES)]
    if not texts:
        raise DistlmError(f"{folder / split}: no text files; expected names that end in {', '.join(SUFFIXES)}")
    if len(texts) < len(inside):
        say(f"data shard: {folder / split}: {len(inside) - len(texts)} files are no {', '.join(SUFFIXES)}: left out")
    return [FileSource(path, path.relative_to(folder).as_posix()) for path in texts]


class FileSource:
    """A UTF-8 text file, possibly compressed. One that is compressed is read forwards only, from where it stands."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._stream: BinaryIO | None = None

    def rule(self, rule: str) -> str:
        return rule

    def scan(self, number: int, rule: str, at_least: int, check: Callable[[int], None]) -> Scan:
        ends = [*cuts(self._checked_blocks(check), rule, at_least)]
        size = self._size
        edges = [0, *(end for end in ends if end < size), size]
        segments = [Segment(number, start, end, end - start) for start, end in pairwise(edges) if start < end]
        digest = hashlib.sha256()
        with self.path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        size_on_disk = self.path.stat().st_size
        return Scan(TextFacts(name=self.name, bytes=size_on_disk, sha256=digest.hexdigest(), text=size), segments)

    def lines(self, segment: Segment, advance: Callable[[int], None]) -> Iterator[str]:
        with _readable(self.path):
            if self._stream is None:
                self._stream = self._open()
            self._stream.seek(segment.start)
        left, held = segment.bytes, b""
        while left:
            with _readable(self.path):
                block = self._stream.read(min(_BLOCK, left))
            if not block:
                raise self._changed()
            left -= len(block)
            advance(len(block))
            held += block
            if left:
                complete, end, held = held.rpartition(b"\n")
                if not end:
                    continue
            else:
                complete = held.removesuffix(b"\n")
            try:
                yield from complete.decode("utf-8").split("\n")
            except UnicodeDecodeError as error:
                raise self._changed() from error

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self) -> BinaryIO:
        if self.name.endswith(".xz"):
            return cast(BinaryIO, lzma.open(self.path, "rb"))
        if self.name.endswith(".gz"):
            return cast(BinaryIO, gzip.open(self.path, "rb"))
        return self.path.open("rb")

    def _checked_blocks(self, check: Callable[[int], None]) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._size, line = 0, 1
        with _readable(self.path), self._open() as stream:
            while block := stream.read(_BLOCK):
                try:
                    decoder.decode(block)
                except UnicodeDecodeError as error:
                    raise self._not_text(error, line) from error
                self._size += len(block)
                line += block.count(b"\n")
                yield block
                check(len(block))
            try:
                decoder.decode(b"", True)
            except UnicodeDecodeError as error:
                raise self._not_text(error, line) from error

    def _not_text(self, error: UnicodeDecodeError, line: int) -> DistlmError:
        line += error.object[: error.start].count(b"\n")
        return DistlmError(
            f"{self.path}, line {line}: not UTF-8 text (byte 0x{error.object[error.start]:02x}); convert the file, "
            "e.g. iconv -f LATIN1 -t UTF-8"
        )

    def _changed(self) -> DistlmError:
        return DistlmError(
            f"{self.path}: the text is not what it was when these shards were begun; put the old text back, or remove "
            "the shards and begin again"
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise DistlmError(f"{path}: damaged or cut compressed file ({error}); get it again") from error
    except OSError as error:
        raise DistlmError(f"{path}: cannot be read ({error})") from error


class TableSource:
    """Rows of text, each a line (or several) or a document."""

    def __init__(
        self, facts: TextFacts, place: str, rows: int, read: Callable[[int, int], Iterator[Any]], whole: bool = False
    ) -> None:
        """`facts`: what is known before reading; `read` gives the rows [start, end); `whole`: a row is a document."""
        self.name, self._place, self._rows, self._read, self._facts = facts.name, place, rows, read, facts
        self._whole = whole

    def rule(self, rule: str) -> str:
        return "line" if self._whole else rule

    def scan(self, number: int, rule: str, at_least: int, check: Callable[[int], None]) -> Scan:
        rule, digest = self.rule(rule), hashlib.sha256()
        segments: list[Segment] = []
        start = size = total = 0
        before, line = "", ""
        for row, text in enumerate(self._texts(0, self._rows)):
            # The cut, if any, is between `line` (row − 1) and this row or, for a title, one earlier.
            ends = {
                "line": row > 0,
                "blank_line": row > 0 and is_blank(line),
                "title": row > 1 and is_blank(before) and is_title(line, text),
            }[rule]
            here, over = (row - 1, _bytes(line)) if rule == "title" else (row, 0)
            if ends and size - over >= at_least:
                segments.append(Segment(number, start, here, size - over))
                start, size = here, over
            data = text.encode()
            digest.update(data + b"\n")
            size, total = size + len(data) + 1, total + len(data) + 1
            before, line = line, text
            check(len(data) + 1)
        if self._rows > start:
            segments.append(Segment(number, start, self._rows, size))
        facts = structs.replace(self._facts, rows=self._rows, sha256=digest.hexdigest(), text=total)
        return Scan(facts, segments)

    def lines(self, segment: Segment, advance: Callable[[int], None]) -> Iterator[str]:
        waiting = 0
        for text in self._texts(segment.start, segment.end):
            yield from [text.replace("\n", " ")] if self._whole else text.split("\n")
            waiting += _bytes(text)
            if waiting > _BLOCK:
                advance(waiting)
                waiting = 0
        advance(waiting)

    def close(self) -> None:
        return None

    def _texts(self, start: int, end: int) -> Iterator[str]:
        for number, text in enumerate(self._read(start, end), start + 1):
            if not isinstance(text, str):
                raise DistlmError(f"{self._place}, row {number}: holds {text!r}, expected text")
            yield text.removesuffix("\n")


def _bytes(line: str) -> int:
    return len(line.encode()) + 1


def _column(table: Any, column: str) -> Callable[[int, int], Iterator[Any]]:
    def read(start: int, end: int) -> Iterator[Any]:
        for first in range(start, end, 1000):
            yield from table[first : min(first + 1000, end)][column]

    return read


def _demo_sources(splits: Sequence[str]) -> dict[str, list[Source]]:
    from distlm.data.demo_text import demo_text

    demo = demo_text()
    known = structs.asdict(demo.description)
    # That is of the package's file; these facts are of the rows.
    del known["sha256"]
    sources: dict[str, list[Source]] = {}
    for split in splits:
        articles: list[list[str]] = []
        for line in demo.lines[split]:
            if _TITLE_OF_DEMO.fullmatch(line) or not articles:
                articles.append([])
            articles[-1].append(line)
        rows = ["\n".join(lines) for lines in articles]
        sources[split] = [
            TableSource(
                TextFacts(name=split, sha256="", text=0, **known), f"demo corpus, {split}", len(rows),
                lambda start, end, rows=rows: iter(rows[start:end]), whole=True,  # type: ignore[misc]
            )
        ]  # fmt: skip
    return sources
