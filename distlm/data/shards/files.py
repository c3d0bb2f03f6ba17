"""The folder of shards: what is in it, its plan, its manifest, and what says that one shard is whole.

manifest.json                 settings, tokenizer, text, and every shard with its chunks; written last
train-00000.tar …             shards: tar files of chunks, which are .npy files [rows, row_tokens]
tokenizer/{vocab.txt,tokenizer.json,tokenizer_config.json}
.plan.json                    while unfinished: which text goes into which shard
.train-00000.json             while unfinished: this shard is whole
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distlm.data.shards.wordpiece import Tokenizer
from distlm.data.text_source import Scan, Segment
from distlm.data.tokens import SPLITS
from distlm.errors import DistlmError
from distlm.runtime.files import json_hash, read_json, write_json

KIND, FORMAT = "distlm shards", 1
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

    settings: dict[str, Any]
    """By the names of ShardsConfig; of a vocabulary file its hash."""
    text: dict[str, list[dict[str, Any]]]
    """Split → name, size, sha256 of each source."""
    units: dict[str, tuple[Unit, ...]]

    @property
    def all_units(self) -> list[Unit]:
        """Of all splits, in order."""
        return [unit for units in self.units.values() for unit in units]

    def tree(self) -> dict[str, Any]:
        """The plan as JSON."""
        segments = {
            split: [[[*asdict(segment).values()] for segment in unit.segments] for unit in units]
            for split, units in self.units.items()
        }
        return {"settings": self.settings, "text": self.text, "units": segments}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "ShardsPlan":
        """What `tree` gave. Raises KeyError, TypeError or ValueError for something else."""
        units = {
            split: tuple(
                Unit(split, index, tuple(Segment(*numbers) for numbers in segments))
                for index, segments in enumerate(of_split)
            )
            for split, of_split in tree["units"].items()
        }
        return cls(dict(tree["settings"]), dict(tree["text"]), units)

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """'shards.NAME: … there, … now' of each setting that differs."""
        return [
            f"shards.{name}: {self.settings.get(name)!r} there, {settings.get(name)!r} now"
            for name in dict.fromkeys([*self.settings, *settings])
            if self.settings.get(name) != settings.get(name)
        ]


def plan_units(split: str, scans: list[Scan], at_least: int) -> tuple[Unit, ...]:
    """Shards of a split: consecutive segments until there are `at_least` bytes of text."""
    groups: list[list[Segment]] = []
    size = at_least
    for segment in (segment for scan in scans for segment in scan.segments):
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

    def tree(self) -> dict[str, Any]:
        """The shard as JSON."""
        head = {"name": self.name, "bytes": self.bytes, "xxh3": self.hash, "rows": self.rows, "tokens": self.tokens}
        chunks = [" ".join([str(c.offset), str(c.bytes), str(c.rows), c.hash]) for c in self.chunks]
        return {**head, "documents": self.documents, "chunks": chunks}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "Shard":
        """What `tree` gave. Raises KeyError, TypeError or ValueError for something else."""
        chunks = []
        for line in tree["chunks"]:
            offset, size, rows, digest = line.split(" ")
            chunks.append(Chunk(int(offset), int(size), int(rows), digest))
        return cls(tree["name"], tree["bytes"], tree["xxh3"], tree["tokens"], tree["documents"], tuple(chunks))


@dataclass(frozen=True)
class ShardsManifest:
    """A finished folder of shards."""

    plan: ShardsPlan
    tokenizer: Tokenizer
    shards: dict[str, tuple[Shard, ...]]

    @property
    def row_tokens(self) -> int:
        """S, [CLS] and [SEP] included."""
        return int(self.plan.settings["row_tokens"])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ids on disk."""
        return id_dtype(self.tokenizer.vocabulary)

    def write(self, folder: Path) -> None:
        """Write manifest.json: from here on the folder is whole."""
        plan = self.plan.tree()
        splits = {}
        for split, shards in self.shards.items():
            splits[split] = {
                "rows": sum(shard.rows for shard in shards),
                "tokens": sum(shard.tokens for shard in shards),
                "documents": sum(shard.documents for shard in shards),
                "shards": [shard.tree() for shard in shards],
            }
        tree = {
            "kind": KIND,
            "format": FORMAT,
            "dtype": str(self.dtype),
            "chunk": "offset bytes rows xxh3-128",
            "unit": "source,start,end,bytes of each piece of text of a shard",
            "tokenizer": asdict(self.tokenizer),
            "settings": plan["settings"],
            "text": plan["text"],
            "splits": splits,
            "units": {
                split: [" ".join(",".join(map(str, numbers)) for numbers in unit) for unit in units]
                for split, units in plan["units"].items()
            },
        }
        write_json(folder / MANIFEST, tree)

    @classmethod
    def read(cls, folder: Path) -> "ShardsManifest":
        """manifest.json of a folder. Raises DistlmError when it is missing, damaged, or of something else."""
        path = folder / MANIFEST
        if not path.exists():
            begun = f"unfinished: {len([*folder.glob('.*-*.json')])} whole shards yet"
            why = begun if (folder / PLAN).exists() else f"no {MANIFEST}"
            raise DistlmError(f"{folder}: no finished shards here ({why}); run `distlm data shard`")
        tree = read_json(path, "manifest of shards")
        if not isinstance(tree, dict) or tree.get("kind") != KIND:
            raise DistlmError(f"{path}: not the manifest of shards; choose another shards.folder")
        if tree.get("format") != FORMAT:
            raise DistlmError(
                f"{path}: format {tree.get('format')!r}, this version of distlm reads {FORMAT}; make the shards again"
            )
        try:
            units = {
                split: [[[int(n) for n in part.split(",")] for part in line.split(" ")] for line in lines]
                for split, lines in tree["units"].items()
            }
            plan = ShardsPlan.from_tree({**tree, "units": units})
            shards = {
                split: tuple(Shard.from_tree(item) for item in facts["shards"])
                for split, facts in tree["splits"].items()
            }
            manifest = cls(plan, Tokenizer(**tree["tokenizer"]), shards)
            rows = {split: sum(shard.rows for shard in of_split) for split, of_split in shards.items()}
            if rows != {split: facts["rows"] for split, facts in tree["splits"].items()}:
                raise ValueError("the rows of the shards are not the sum")
            int(manifest.row_tokens)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DistlmError(
                f"{path}: the file was edited or is damaged ({error}): remove the folder and make the shards again"
            ) from error
        return manifest


def id_dtype(vocabulary: int) -> np.dtype[Any]:
    """Little-endian uint16 where all ids fit, else int32."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<i4")


def marker_path(folder: Path, name: str) -> Path:
    """Marker of a whole shard in an unfinished folder."""
    return folder / f".{name}.json"


def belonging(plan: ShardsPlan, tokenizer: Tokenizer) -> str:
    """What a shard's marker says it belongs to."""
    return json_hash([plan.tree(), tokenizer.hash])


def write_marker(folder: Path, belongs: str, shard: Shard) -> None:
    """Mark a shard as whole; call after its file is in place."""
    write_json(marker_path(folder, shard.name), {"belongs": belongs, **shard.tree()})


def read_marker(folder: Path, belongs: str, unit: Unit) -> Shard | None:
    """The shard when it is whole: a marker of this plan and tokenizer, and a file of the right size."""
    path = marker_path(folder, unit.name)
    if not path.exists():
        return None
    try:
        tree = read_json(path, "marker of a shard")
        shard = Shard.from_tree(tree)
        if tree["belongs"] != belongs or shard.name != unit.name:
            return None
    except (DistlmError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return None if shard.problem(folder) else shard
