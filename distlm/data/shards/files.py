"""The folder of shards: what is in it, its plan, its manifest, and what says that one shard is whole.

manifest.json                 settings, tokenizer, text, and every shard with its chunks; written last
train-00000.tar …             shards: tar files of chunks, which are .npy files [rows, row_tokens]
tokenizer/{vocab.txt,tokenizer.json,tokenizer_config.json}
.plan.json                    while unfinished: which text goes into which shard
.train-00000.json             while unfinished: this shard is whole
"""

import re
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from distlm.data.shards.records import (
    ManifestFile,
    Marker,
    PlanFile,
    ShardEntry,
    ShardSettings,
    SplitEntry,
    TextFacts,
    Tokenizer,
)
from distlm.data.text.source import Segment
from distlm.data.tokens import SPLITS
from distlm.errors import DistlmError
from distlm.runtime.files import file_hash, json_hash

MANIFEST, PLAN, TOKENIZER_FOLDER = "manifest.json", ".plan.json", "tokenizer"
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.tar")


@dataclass(frozen=True)
class Unit:
    """The unit of work: the text of one shard, in order."""

    split: str
    index: int
    segments: tuple[Segment, ...]

    @property
    def name(self) -> str:
        """Name of the shard without its suffix."""
        return f"{self.split}-{self.index:05d}"

    @property
    def bytes(self) -> int:
        """Of text."""
        return sum(segment.bytes for segment in self.segments)


@dataclass(frozen=True)
class ShardsPlan:
    """Everything that decides the bytes of the shards, besides the text itself."""

    settings: ShardSettings
    text: dict[str, list[TextFacts]]
    """The sources of each split."""
    units: dict[str, tuple[Unit, ...]]

    @property
    def all_units(self) -> list[Unit]:
        """Of all splits, in order."""
        return [unit for units in self.units.values() for unit in units]

    def record(self) -> PlanFile:
        """As a file."""
        units = {split: [[_numbers(part) for part in unit.segments] for unit in of] for split, of in self.units.items()}
        return PlanFile(settings=self.settings, text=self.text, units=units)

    @classmethod
    def read(cls, path: Path) -> "ShardsPlan":
        """The plan of a file. Raises DistlmError when it is damaged."""
        record = PlanFile.read(path)
        units = {
            split: tuple(
                Unit(split, index, tuple(Segment(*numbers) for numbers in segments))
                for index, segments in enumerate(of_split)
            )
            for split, of_split in record.units.items()
        }
        return cls(record.settings, record.text, units)

    def differences(self, settings: ShardSettings) -> list[str]:
        """'shards.NAME: … there, … now' of each setting that differs."""
        there, now = msgspec.to_builtins(self.settings), msgspec.to_builtins(settings)
        return [
            f"shards.{name}: {there.get(name)!r} there, {now.get(name)!r} now"
            for name in dict.fromkeys([*there, *now])
            if there.get(name) != now.get(name)
        ]


def _numbers(segment: Segment) -> tuple[int, int, int, int]:
    return segment.source, segment.start, segment.end, segment.bytes


def plan_units(split: str, segments: list[Segment], at_least: int) -> tuple[Unit, ...]:
    """Shards of a split: consecutive segments until there are `at_least` bytes of text."""
    groups: list[list[Segment]] = []
    size = at_least
    for segment in segments:
        if size >= at_least:
            groups.append([])
            size = 0
        groups[-1].append(segment)
        size += segment.bytes
    return tuple(Unit(split, index, tuple(group)) for index, group in enumerate(groups))


@dataclass(frozen=True)
class Chunk:
    """A .npy file in a shard: `bytes` bytes from `offset` on; hash is xxh3-128 of them."""

    offset: int
    bytes: int
    rows: int
    hash: str


@dataclass(frozen=True)
class Shard:
    """A written shard; hash is xxh3-128 of the whole file, tokens are those of text (no special ones)."""

    name: str
    bytes: int
    hash: str
    tokens: int
    documents: int
    chunks: tuple[Chunk, ...]

    @property
    def rows(self) -> int:
        """Rows of all chunks."""
        return sum(chunk.rows for chunk in self.chunks)

    def path(self, folder: Path) -> Path:
        """The tar file."""
        return folder / f"{self.name}.tar"

    def problem(self, folder: Path) -> str | None:
        """Why the file cannot be this shard, judged by its size; None when it can."""
        path = self.path(folder)
        if not path.is_file():
            return "missing"
        size = path.stat().st_size
        return None if size == self.bytes else f"{size} bytes, and the manifest says {self.bytes}"

    def entry(self) -> ShardEntry:
        """As in the manifest."""
        chunks = [" ".join(map(str, astuple(chunk))) for chunk in self.chunks]
        return ShardEntry(self.name, self.bytes, self.hash, self.rows, self.tokens, self.documents, chunks)

    @classmethod
    def of(cls, entry: ShardEntry | Marker) -> "Shard":
        """The shard of an entry. Raises ValueError for a chunk that is none."""
        chunks = []
        for line in entry.chunks:
            offset, size, rows, digest = line.split(" ")
            chunks.append(Chunk(int(offset), int(size), int(rows), digest))
        return cls(entry.name, entry.bytes, entry.xxh3, entry.tokens, entry.documents, tuple(chunks))


@dataclass(frozen=True)
class ShardsManifest:
    """A finished folder of shards."""

    plan: ShardsPlan
    tokenizer: Tokenizer
    shards: dict[str, tuple[Shard, ...]]

    @property
    def row_tokens(self) -> int:
        """S, [CLS] and [SEP] included."""
        return self.plan.settings.row_tokens

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ids on disk."""
        return id_dtype(self.tokenizer.vocabulary)

    def write(self, folder: Path) -> None:
        """Write manifest.json: from here on the folder is whole."""
        splits = {
            split: SplitEntry(
                rows=sum(shard.rows for shard in shards),
                tokens=sum(shard.tokens for shard in shards),
                documents=sum(shard.documents for shard in shards),
                shards=[shard.entry() for shard in shards],
            )
            for split, shards in self.shards.items()
        }
        units = {
            split: [" ".join(",".join(map(str, _numbers(part))) for part in unit.segments) for unit in of_split]
            for split, of_split in self.plan.units.items()
        }
        ManifestFile(
            dtype=str(self.dtype), tokenizer=self.tokenizer, settings=self.plan.settings, text=self.plan.text,
            splits=splits, units=units, others={
                f"{TOKENIZER_FOLDER}/{path.name}": file_hash(path)
                for path in sorted((folder / TOKENIZER_FOLDER).iterdir())
            },
        ).write(folder / MANIFEST)  # fmt: skip

    @classmethod
    def read(cls, folder: Path) -> "ShardsManifest":
        """manifest.json of a folder. Raises DistlmError when it is missing, damaged, or of something else."""
        path = folder / MANIFEST
        if not path.exists():
            begun = f"unfinished: {len([*folder.glob('.*-*.json')])} whole shards yet"
            why = begun if (folder / PLAN).exists() else f"no {MANIFEST}"
            raise DistlmError(f"{folder}: no finished shards here ({why}); run `distlm data shard`")
        record = ManifestFile.read(path)
        try:
            units = {
                split: tuple(_unit_of(split, index, line) for index, line in enumerate(lines))
                for split, lines in record.units.items()
            }
            shards = {split: tuple(map(Shard.of, facts.shards)) for split, facts in record.splits.items()}
            for split, of_split in shards.items():
                if sum(shard.rows for shard in of_split) != record.splits[split].rows:
                    raise ValueError("the rows of the shards are not the sum")
        except ValueError as error:
            raise DistlmError(f"{path}: not a valid {record.WHAT} ({error}); {record.MEND}") from error
        return cls(ShardsPlan(record.settings, record.text, units), record.tokenizer, shards)


def _unit_of(split: str, index: int, line: str) -> Unit:
    """The unit of a line of the manifest. Raises ValueError for something else."""
    segments = []
    for part in line.split(" "):
        source, start, end, size = map(int, part.split(","))
        segments.append(Segment(source, start, end, size))
    return Unit(split, index, tuple(segments))


def id_dtype(vocabulary: int) -> np.dtype[Any]:
    """Little-endian uint16 where all ids fit, else int32."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<i4")


def marker_path(folder: Path, name: str) -> Path:
    """Marker of a whole shard in an unfinished folder."""
    return folder / f".{name}.json"


def belonging(plan: ShardsPlan, tokenizer: Tokenizer) -> str:
    """What a shard's marker says it belongs to."""
    record = plan.record().tree()
    # So that shards which were begun before plans had a format go on.
    del record["format"]
    return json_hash([record, tokenizer.hash])


def write_marker(folder: Path, belongs: str, shard: Shard) -> None:
    """Mark a shard as whole; call after its file is in place."""
    Marker(belongs=belongs, **msgspec.structs.asdict(shard.entry())).write(marker_path(folder, shard.name))


def read_marker(folder: Path, belongs: str, unit: Unit) -> Shard | None:
    """The shard when it is whole: a marker of this plan and tokenizer, and a file of the right size."""
    path = marker_path(folder, unit.name)
    if not path.exists():
        return None
    try:
        record = Marker.read(path)
        shard = Shard.of(record)
    except (DistlmError, ValueError):
        return None
    if record.belongs != belongs or shard.name != unit.name or shard.problem(folder):
        return None
    return shard
