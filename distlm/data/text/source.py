"""What every source of text answers, and the plain one: a text file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from distlm.data.documents import cuts
from distlm.data.shards.records import TextFacts
from distlm.data.text.check import Spelled, TextCheck
from distlm.data.text.held_out import split_of, stem_of
from distlm.data.text.stream import TextStream, whole_lines
from distlm.errors import DistlmError


@dataclass(frozen=True)
class Segment:
    """Consecutive documents of one source, [start, end): bytes of its unpacked text, or rows of its table."""

    source: int
    """Number of the source in its split."""
    start: int
    end: int
    bytes: int
    """Of UTF-8 text."""


@dataclass(frozen=True)
class Cutting:
    """How a source is cut into segments."""

    rule: str = "whole"
    """How its lines fall into documents; `Source.rule` of what the settings say."""
    at_least: int = 1 << 62
    """Bytes of text of a segment that others follow."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Split → the share of the documents that it takes from this source."""
    specials: Sequence[str] = ()
    """Words to count."""

    @property
    def shortest(self) -> int:
        """Bytes after which the next end of a document is looked for: each one where splits share them."""
        return 1 if self.shares else self.at_least


@dataclass(frozen=True)
class Scan:
    """What one look at a source found: facts for the manifest, and where it can be cut."""

    facts: TextFacts
    lines: int
    segments: list[Segment]
    """Without what other splits take."""
    held_out: dict[str, list[Segment]]
    """Split → its segments, where splits share the documents."""
    spelled: dict[str, int]
    """Special token → how often the text spells it."""

    def of(self, split: str) -> list[Segment]:
        """The segments of a split of this source."""
        return self.held_out.get(split, [] if split in self.held_out else self.segments)


class Source(Protocol):
    """One file or table of a split."""

    name: str
    """In the manifest: relative to the text's folder."""

    def scan(self, number: int, cutting: Cutting, check: Callable[[int], None]) -> Scan:
        """Read it all, once; `check` is told bytes of text read. Raises DistlmError for text that cannot be used."""

    def lines(self, segment: Segment, advance: Callable[[int], None]) -> Iterator[str]:
        """Lines of a segment without their ends; segments must be asked for in order to be quick."""

    def places(self) -> Iterator[tuple[Callable[[], str], str]]:
        """(what errors call it, text) of all lines, or rows."""

    def rule(self, rule: str) -> str:
        """How these lines fall into documents (the setting `documents`, and what it is for this source)."""

    def close(self) -> None:
        """Let go of what reading keeps open."""


class Segments:
    """Puts consecutive documents together to segments, each of one split."""

    def __init__(self, source: int, name: str, cutting: Cutting) -> None:
        self._source, self._stem, self._cutting = source, stem_of(name), cutting
        self._by_split: dict[str, list[Segment]] = {split: [] for split in ("train", *cutting.shares)}
        # The segment that is being put together.
        self._split, self._start, self._bytes = "train", 0, 0
        self._documents = 0
        self.end = 0
        """Where the last document ends."""

    def add(self, end: int, size: int) -> None:
        """The documents (one, where splits share them) up to `end`, of `size` bytes."""
        shares = self._cutting.shares
        split = split_of(self._stem, self._documents, shares) if shares else "train"
        if split != self._split or self._bytes >= self._cutting.at_least:
            self._keep()
            self._split, self._start, self._bytes = split, self.end, 0
        self._bytes += size
        self._documents += 1
        self.end = end

    def scan(self, facts: TextFacts, lines: int, spelled: Spelled) -> Scan:
        """All of them."""
        self._keep()
        held_out = {split: found for split, found in self._by_split.items() if split != "train"}
        return Scan(facts, lines, self._by_split["train"], held_out, dict(spelled.counts))

    def _keep(self) -> None:
        if self._bytes:
            segment = Segment(self._source, self._start, self.end, self._bytes)
            self._by_split[self._split].append(segment)


class FileSource:
    """A UTF-8 text file, possibly compressed. One that is compressed is read forwards only, from where it stands."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.stream = TextStream(path)

    def rule(self, rule: str) -> str:
        return rule

    def scan(self, number: int, cutting: Cutting, check: Callable[[int], None]) -> Scan:
        spelled, found = Spelled(cutting.specials), Segments(number, self.name, cutting)
        looked, size = TextCheck(self.path, spelled), 0

        def blocks() -> Iterator[bytes]:
            nonlocal size
            for block in self.stream.blocks():
                looked.add(block)
                size += len(block)
                yield block
                check(len(block))
            looked.add(b"", last=True)

        for end in cuts(blocks(), cutting.rule, cutting.shortest):
            found.add(end, end - found.end)
        if found.end < size:
            found.add(size, size - found.end)
        facts = TextFacts(name=self.name, bytes=self.path.stat().st_size, sha256=self.stream.sha256, text=size)
        return found.scan(facts, looked.lines, spelled)

    def lines(self, segment: Segment, advance: Callable[[int], None]) -> Iterator[str]:
        left = segment.bytes

        def blocks() -> Iterator[bytes]:
            nonlocal left
            for block in self.stream.part(segment.start, segment.bytes):
                left -= len(block)
                advance(len(block))
                yield block

        for piece in whole_lines(blocks()):
            try:
                yield from piece.removesuffix(b"\n").decode("utf-8").split("\n")
            except UnicodeDecodeError as error:
                raise changed(self.path) from error
        if left:
            raise changed(self.path)

    def places(self) -> Iterator[tuple[Callable[[], str], str]]:
        number = 0
        for piece in whole_lines(self.stream.blocks()):
            for line in piece.removesuffix(b"\n").decode("utf-8").split("\n"):
                number += 1
                yield lambda number=number: f"{self.path}, line {number}", line  # type: ignore[misc]

    def close(self) -> None:
        self.stream.close()


def changed(path: Path) -> DistlmError:
    """The error for a text that is not what its scan found."""
    return DistlmError(
        f"{path}: the text is not what it was when this was begun; put the old text back, or remove what was made of "
        "it and begin again"
    )
