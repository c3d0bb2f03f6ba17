"""How much text files hold, told from the start of some: for plans, before they are read."""

from collections.abc import Sequence
from typing import BinaryIO, cast

from distlm.data.text.folder import FolderSource
from distlm.data.text.packed import packing, readable, unpacked
from distlm.data.text.parquet import ParquetSource
from distlm.data.text.source import FileSource
from distlm.data.text.stream import BLOCK, Hashed

_SAMPLE = 1 << 20
_MOST = 64 << 20
"""Bytes that are unpacked at most to see how well a file is packed."""
_MEASURED = 3
"""Files of each form that are looked into, the largest; others are taken to be like them."""


def text_bytes(sources: Sequence[FolderSource]) -> float:
    """About how many bytes of UTF-8 text files have; exact for plain text."""
    sizes = {source.name: source.path.stat().st_size for source in sources}
    plain = [source for source in sources if isinstance(source, FileSource) and not packing(source.name)]
    total = float(sum(sizes[source.name] for source in plain))
    by_form: dict[str, list[FolderSource]] = {}
    for source in sources:
        if source not in plain:
            by_form.setdefault("".join(source.path.suffixes[-2:]), []).append(source)
    for alike in by_form.values():
        largest = sorted(alike, key=lambda source: -sizes[source.name])[:_MEASURED]
        stored = sum(sizes[source.name] for source in largest)
        found = sum(_text_bytes(source) for source in largest)
        total += found + (sum(sizes[source.name] for source in alike) - stored) * found / max(stored, 1)
    return total


def text_start(sources: Sequence[FolderSource]) -> str:
    """About the first megabyte of text of the first file that has any. Raises DistlmError for records without text."""
    for source in sources:
        if isinstance(source, FileSource):
            text = b"".join(source.stream.part(0, _SAMPLE)).decode("utf-8", "replace")
        else:
            text, _ = source.start(_SAMPLE)
        source.close()
        if text:
            return text
    return ""


def _text_bytes(source: FolderSource) -> float:
    if isinstance(source, ParquetSource):
        found = source.start(_SAMPLE)[1]
        source.close()
        return found
    size = _unpacked_size(source)
    if isinstance(source, FileSource):
        return size
    text, read = source.start(_SAMPLE)
    source.close()
    return size * len(text.encode()) / read if read else size


def _unpacked_size(source: FolderSource) -> float:
    size = source.path.stat().st_size
    if not packing(source.path.name) or size == 0:
        return size
    with readable(source.path), source.path.open("rb") as opened:
        raw, found, packed = Hashed(opened), 0, 0
        file = unpacked(source.path.name, cast(BinaryIO, raw))
        while found < _MOST:
            if not (block := file.read(BLOCK)):
                return found
            # Behind the sample, all that it unpacks to is taken: bzip2 does that in large pieces.
            if packed >= _SAMPLE and raw.size > packed:
                break
            found, packed = found + len(block), raw.size
    return size * found / packed
