"""Codes of the keys of a shard before it is a part: several ranks encode its units and write them to one file.

PARTS/
  .part-00000.codes    list number and code of each key [rows, coarse + code_size], in order; holes before it is whole
  .codes.json          which units are written, with their checksums
A unit is a number of whole blocks of the encoder, counted from the shard's first key: no code depends on the units.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import to_builtins

from distlm.datastore.plan import MOST_UNITS, Unit, cut
from distlm.datastore.reader import Datastore
from distlm.index.build.encode import Encoder, block_of
from distlm.index.build.template import Template
from distlm.index.factory import inverted_file
from distlm.index.layout import Array, IndexFolder, deserialise
from distlm.index.records import CODES, CodesRecord, PartRecord
from distlm.runtime.files import bytes_hash, json_hash
from distlm.runtime.ranks.share import Share
from distlm.runtime.units.lost import lost_writes
from distlm.system_errors import told


def unit_rows(block: int, rows: int) -> int:
    """Keys of a unit of an encoder whose blocks have `block` keys, in a store of `rows`."""
    return block * max(1, rows // (MOST_UNITS * block))


def planned_units(index: Any, shards: Sequence[int]) -> int:
    """Units of a store with shards of so many rows, for an index of this kind, trained or not."""
    step = unit_rows(block_of(inverted_file(index)), sum(shards))
    return sum(-(-rows // step) for rows in shards)


@dataclass(frozen=True)
class CodeFiles:
    """The files of codes of one index; where shares build it, those of one share. No method is collective."""

    folder: IndexFolder
    of: PartRecord
    """What a part would say: codes of another store or template count for nothing."""
    share: Share | None
    unit_rows: int
    row_bytes: int
    """Of a key's list number and code."""

    @property
    def record(self) -> Path:
        """Which units are written; shares run at once."""
        name = ".codes.json" if self.share is None else f".codes-{self.share.index}-of-{self.share.count}.json"
        return self.folder.parts / name

    @property
    def _key(self) -> str:
        return json_hash([to_builtins(self.of), self.unit_rows, self.row_bytes])

    def path(self, shard: int) -> Path:
        """Codes of a shard."""
        return self.folder.parts / f".{self.folder.part(shard).stem}.codes"

    def units(self, datastore: Datastore, shard: int) -> list[Unit]:
        """Units of a shard."""
        return cut(shard, datastore.shards[shard].rows, self.unit_rows)

    def load(self) -> dict[str, str]:
        """Written units → xxh3-128. A run without a share takes what shares have written, and they what it has."""
        whole = self.folder.parts / ".codes.json"
        paths = sorted(self.folder.parts.glob(CODES)) if self.share is None else [whole, self.record]
        found = [record for path in paths if (record := CodesRecord.peek(path)) and record.key == self._key]
        return {unit: digest for record in found for unit, digest in record.done.items()}

    def save(self, done: dict[str, str]) -> None:
        """Record which units are written; call after they are on the disk."""
        CodesRecord(key=self._key, done=done).write(self.record)
        if self.share is None:
            self._remove(CODES, self.record)

    def has_room(self, shard: int, units: Sequence[Unit]) -> bool:
        """Whether the file is large enough to hold these units."""
        path, end = self.path(shard), max(unit.first + unit.rows for unit in units)
        return path.exists() and path.stat().st_size >= end * self.row_bytes

    def forget(self, shard: int) -> None:
        """Remove what is written of a shard."""
        self.path(shard).unlink(missing_ok=True)

    def begin(self, shard: int) -> None:
        """Make the file of a shard anew, empty. On one rank, before others look for it: a network file system may
        remember for half a minute that a file was not there."""
        self.forget(shard)
        self.path(shard).touch()

    def clear(self) -> None:
        """All parts are there: nothing of this is needed any more."""
        self._remove(CODES)
        self._remove(".part-*.codes")

    def _remove(self, pattern: str, but: Path | None = None) -> None:
        for path in self.folder.parts.glob(pattern):
            if path != but:
                path.unlink(missing_ok=True)

    def write(self, shard: int, units: Sequence[Unit], pieces: Iterator[Array]) -> dict[str, str]:
        """Write the codes of units that follow each other, given in `pieces` uint8 [n, row_bytes] of any length, and
        flush them. Returns their checksums."""
        path, done = self.path(shard), dict[str, str]()
        held = np.empty((0, self.row_bytes), np.uint8)
        with told(path):
            # Not truncated: other processes write their own units into it.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            with os.fdopen(descriptor, "wb") as stream:
                stream.seek(units[0].first * self.row_bytes)
                for unit in units:
                    while len(held) < unit.rows:
                        held = np.concatenate([held, next(pieces)])
                    data, held = held[: unit.rows], held[unit.rows :]
                    stream.write(data.data)
                    done[unit.key] = bytes_hash(data.tobytes())
                stream.flush()
                os.fsync(stream.fileno())
        return done

    def assemble(self, datastore: Datastore, shard: int, template: Template, done: dict[str, str]) -> Any:
        """The part of a shard from its codes: a faiss index of its keys under their global row numbers.

        Raises DistlmError for codes that are not those that were written, and removes them.
        """
        index = deserialise(template.data)
        inner, first = inverted_file(index), datastore.shards[shard].first_row
        with told(self.path(shard)), self.path(shard).open("rb") as stream:
            for unit in self.units(datastore, shard):
                data = stream.read(unit.rows * self.row_bytes)
                # First: faiss ends the process, or worse, where a list number is none.
                if bytes_hash(data) != done[unit.key]:
                    self.forget(shard)
                    raise lost_writes(self.path(shard), "encodes")
                codes = np.frombuffer(data, np.uint8).reshape(unit.rows, self.row_bytes)
                ids = np.arange(first + unit.first, first + unit.first + unit.rows, dtype=np.int64)
                inner.add_sa_codes(codes, ids)
        index.ntotal = inner.ntotal
        return index


def encoded(
    encoder: Encoder, batches: Iterator[tuple[int, Array]], before: Callable[[int, Array], None]
) -> Iterator[Array]:
    """Codes of (first row, keys fp32 [n, D]) in order, uint8 [≤ block, row_bytes]; `before` is given each of these."""
    for start, keys in batches:
        before(start, keys)
        yield from encoder.codes(keys)
