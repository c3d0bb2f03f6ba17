"""Which units of a merge are written, so that one that was killed goes on from there."""

import time
from pathlib import Path

from distlm.errors import DistlmError
from distlm.index.merge.copy import MergeLayout
from distlm.index.records import MergeJournal
from distlm.runtime.files import bytes_hash, json_hash

SAVE_S = 2.0
"""Seconds between two records: a merge that is killed writes what came after the last one again."""


class Journal:
    """FILE.json beside the unfinished FILE: unit → xxh3-128 of what was written. Used on one rank."""

    def __init__(self, file: Path, layout: MergeLayout, unit_bytes: int) -> None:
        self._file, self._path = file, file.with_name(file.name + ".json")
        self._key = merge_key(layout, unit_bytes)
        self._bytes = layout.bytes
        self._saved = time.monotonic()

    def load(self) -> dict[int, str]:
        """Units that are in the file; none when it is of another merge, or a part has changed since."""
        if not self._file.exists() or self._file.stat().st_size != self._bytes:
            return {}
        try:
            record = MergeJournal.read(self._path)
            return {int(unit): digest for unit, digest in record.units.items()} if record.key == self._key else {}
        except (ValueError, DistlmError):
            return {}

    def save(self, units: dict[int, str], now: bool = False) -> None:
        """Record `units`, if it is time."""
        if not now and time.monotonic() - self._saved < SAVE_S:
            return
        MergeJournal(key=self._key, units={str(unit): digest for unit, digest in units.items()}).write(self._path)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """The file is whole, or to be written anew."""
        self._path.unlink(missing_ok=True)


def merge_key(layout: MergeLayout, unit_bytes: int) -> str:
    """What the merged file is made of; a part that was written again since gives another."""
    parts = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in layout.paths]
    sizes = bytes_hash(layout.sizes.tobytes())
    # Before units were ranges of bytes the last entry was a number.
    return json_hash([bytes_hash(layout.start), sizes, parts, list(layout.shifts), f"{unit_bytes} bytes"])
