"""How much text a file holds, told from its start: for plans, before it is read."""

from typing import BinaryIO, NamedTuple, cast

from distlm.data.text.folder import FolderSource
from distlm.data.text.packed import packing, readable, unpacked
from distlm.data.text.parquet import ParquetSource
from distlm.data.text.source import FileSource
from distlm.data.text.stream import BLOCK, Hashed

_SAMPLE = 1 << 20
_MOST = 64 << 20
"""Bytes that are unpacked at most to see how well a file is packed."""


class Sample(NamedTuple):
    """The start of a text, and about how much the whole has."""

    text: str
    bytes: float
    """Of UTF-8 text; exact for a small file, and for a plain text."""


def sample(source: FolderSource) -> Sample:
    """Of one file. Raises DistlmError for one that cannot be read at all."""
    if isinstance(source, ParquetSource):
        return Sample(*source.start())
    size = _unpacked_size(source)
    if isinstance(source, FileSource):
        text = b"".join(source.stream.part(0, _SAMPLE)).decode("utf-8", "replace")
        source.close()
        return Sample(text, size)
    text, read = source.start(_SAMPLE)
    source.close()
    return Sample(text, size * len(text.encode()) / read if read else size)


def _unpacked_size(source: FolderSource) -> float:
    size = source.path.stat().st_size
    if not packing(source.path.name) or size == 0:
        return size
    with readable(source.path), source.path.open("rb") as opened:
        raw, found = Hashed(opened), 0
        file = unpacked(source.path.name, cast(BinaryIO, raw))
        while raw.size < _SAMPLE and found < _MOST:
            if not (block := file.read(BLOCK)):
                return found
            found += len(block)
    # What was read of the file last is not all unpacked yet.
    return size * found / min(raw.size, size)
