"""Copies list ranges of the parts to their exact places in the merged file, in bounded memory."""

import ctypes
import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from distlm.errors import DistlmError
from distlm.index.layout import Array, lists_header
from distlm.system_errors import told

PIECE = 16 << 20
"""Bytes copied at once where one list alone is larger than a unit."""
IOVECS = 1024
"""Pieces of one scattered read (POSIX allows so many)."""
# Linux has it.
_fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True)
class MergeLayout:
    """Where every list of every part goes. `sizes` int64 [parts, nlist] are keys per list."""

    header: bytes
    """Bytes before the lists, with ntotal set."""
    part_headers: tuple[int, ...]
    """Bytes before the first list in each part."""
    paths: tuple[Path, ...]
    sizes: Array
    code_size: int
    shifts: tuple[int, ...] = ()
    """What is added to the ids of each part; empty: nothing."""

    @cached_property
    def start(self) -> bytes:
        """The merged file up to its first list."""
        return self.header + lists_header(self.sizes.sum(axis=0), self.code_size)

    @cached_property
    def offsets(self) -> Array:
        """Offset of each list in the merged file, int64 [nlist + 1]; the last is the file's size."""
        return len(self.start) + self._ends(self.sizes.sum(axis=0))

    @cached_property
    def part_offsets(self) -> Array:
        """Offset of each list in each part, int64 [parts, nlist + 1]."""
        starts = np.asarray(self.part_headers, np.int64)[:, None]
        return starts + np.stack([self._ends(row) for row in self.sizes])

    def _ends(self, sizes: Array) -> Array:
        return np.concatenate([[0], np.cumsum(sizes * (self.code_size + 8))]).astype(np.int64)

    @property
    def bytes(self) -> int:
        """Size of the merged file."""
        return int(self.offsets[-1])

    def units(self, unit_bytes: int) -> list[tuple[int, int]]:
        """List ranges [low, high) of about `unit_bytes` of output each; one larger list is a unit by itself."""
        marks = np.arange(self.offsets[0], self.offsets[-1], unit_bytes)
        edges = {*np.searchsorted(self.offsets[:-1], marks).tolist(), len(self.offsets) - 1}
        return list(pairwise(sorted(edges)))


def fits(layout: MergeLayout, low: int, high: int, unit_bytes: int) -> bool:
    """Whether lists [low, high) may be held in memory at once; a single one may be larger than a unit."""
    return int(layout.offsets[high] - layout.offsets[low]) <= 2 * unit_bytes


def write_unit(layout: MergeLayout, low: int, buffer: Array, output: int) -> str:
    """Write `buffer`, the lists from `low` on, to the file descriptor `output`; its xxh3-128."""
    write_at(output, buffer.data, int(layout.offsets[low]))
    return str(xxhash.xxh3_128(buffer.data).hexdigest())


def copy_pieces(layout: MergeLayout, low: int, high: int, output: int) -> str:
    """Copy lists [low, high) of all parts to `output`, PIECE bytes at a time; the xxh3-128 of what was written."""
    digest = xxhash.xxh3_128()
    place = int(layout.offsets[low])
    for number in range(low, high):
        for skip, width in ((0, layout.code_size), (layout.code_size, 8)):
            for part, path in enumerate(layout.paths):
                count = int(layout.sizes[part, number])
                source = int(layout.part_offsets[part, number]) + count * skip
                for piece in _read_pieces(path, source, count * width):
                    data = _shifted(layout, part, piece) if skip else piece
                    write_at(output, data, place)
                    digest.update(data)
                    place += len(data)
    return str(digest.hexdigest())


def assemble(layout: MergeLayout, low: int, high: int, buffer: Array) -> Array:
    """Lists [low, high) as they lie in the merged file: for each list the codes of all parts, then the ids.

    Returns the part of `buffer` uint8 that they fill. Each byte is read to its place at once.
    """
    whole = buffer[: int(layout.offsets[high] - layout.offsets[low])]
    width = layout.code_size
    counts = layout.sizes[:, low:high].sum(axis=0)
    code_at = layout.offsets[low:high] - layout.offsets[low]
    id_at = code_at + counts * width
    for part, path in enumerate(layout.paths):
        sizes = layout.sizes[part, low:high]
        filled = np.flatnonzero(sizes)
        starts = np.stack([code_at, id_at], axis=1)[filled].ravel()
        stops = starts + (sizes[filled, None] * np.array([width, 8])).ravel()
        pieces = [whole[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        _read_scattered(path, int(layout.part_offsets[part, low]), pieces)
        if shift := layout.shifts[part] if layout.shifts else 0:
            for ids in pieces[1::2]:
                ids.view("<i8")[:] += shift
        code_at, id_at = code_at + sizes * width, id_at + sizes * 8
    return whole


def _read_scattered(path: Path, offset: int, pieces: list[Array]) -> None:
    """Fill `pieces` uint8, one after the other, with a file's bytes from `offset`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for first in range(0, len(pieces), IOVECS):
            waiting = [piece.data for piece in pieces[first : first + IOVECS]]
            while waiting:
                count = os.preadv(descriptor, waiting, offset)
                if not count:
                    raise _cut(path, sum(map(len, waiting)))
                offset += count
                while waiting and count >= len(waiting[0]):
                    count -= len(waiting.pop(0))
                if count:
                    waiting[0] = waiting[0][count:]
    finally:
        os.close(descriptor)


def _shifted(layout: MergeLayout, part: int, ids: bytes) -> Any:
    """Ids of a part, as bytes, under their numbers in the merged index."""
    shift = layout.shifts[part] if layout.shifts else 0
    if not shift:
        return ids
    return (np.frombuffer(ids, "<i8") + shift).astype("<i8").view(np.uint8)


def read_at(path: Path, offset: int, count: int) -> bytes:
    """`count` bytes of a file from `offset`. Raises DistlmError when it ends before."""
    # Plain reads, no mapping: mapped pages count as this process's memory until the kernel wants them back.
    with path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        pieces, left = [], count
        while left:
            piece = stream.read(left)
            if not piece:
                raise _cut(path, left)
            pieces.append(piece)
            left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _cut(path: Path, missing: int) -> DistlmError:
    return DistlmError(f"{path}: ends {missing} bytes early while it is merged: it was cut or changed meanwhile")


def write_at(output: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError, which names no file."""
    rest = memoryview(data)
    while len(rest):
        count = os.pwrite(output, rest[: 1 << 30], offset)
        rest, offset = rest[count:], offset + count


def preallocate(path: Path, total: int) -> None:
    """Create a file of `total` bytes, its blocks reserved where the file system can.

    Raises DistlmError when the disk is full.
    """
    with told(path), path.open("wb") as stream:
        if not _reserve(stream.fileno(), total):
            os.ftruncate(stream.fileno(), total)


def _reserve(output: int, total: int) -> bool:
    """Reserve the first `total` bytes of a file; false where its file system cannot. Raises OSError.

    By the kernel's own call: os.posix_fallocate writes a byte into every block where it is missing (NFS before 4.2).
    """
    while _fallocate is not None and _fallocate(output, 0, 0, total):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return _fallocate is not None


def hash_in_order(path: Path, pieces: list[tuple[int, str]]) -> tuple[str, list[int]]:
    """xxh3-128 of a file read once, and the numbers of the consecutive pieces (bytes, xxh3) that read otherwise.

    It reads ahead of the hashing. Memory: twice PIECE.
    """
    whole, digests = xxhash.xxh3_128(), [xxhash.xxh3_128() for _ in pieces]
    turns = [
        (number, min(PIECE, count - start))
        for number, (count, _) in enumerate(pieces)
        for start in range(0, count, PIECE)
    ]
    buffers = [memoryview(bytearray(PIECE)) for _ in range(2)]
    with path.open("rb", buffering=0) as stream, ThreadPoolExecutor(1) as reader:

        def read(turn: int) -> memoryview:
            wanted, filled = buffers[turn % 2][: turns[turn][1]], 0
            while filled < len(wanted) and (count := stream.readinto(wanted[filled:])):
                filled += count
            return wanted[:filled]

        ahead = reader.submit(read, 0) if turns else None
        for turn, (number, _) in enumerate(turns):
            assert ahead is not None
            data = ahead.result()
            if turn + 1 < len(turns):
                ahead = reader.submit(read, turn + 1)
            digests[number].update(data)
            whole.update(data)
    wrong = [number for number, (_, expected) in enumerate(pieces) if digests[number].hexdigest() != expected]
    return str(whole.hexdigest()), wrong


def _read_pieces(path: Path, offset: int, count: int) -> Iterator[bytes]:
    for start in range(0, count, PIECE):
        yield read_at(path, offset + start, min(PIECE, count - start))
