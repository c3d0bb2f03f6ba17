"""Copies byte ranges of the merged file from the parts to their exact places, in bounded memory."""

import ctypes
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from distlm.errors import DistlmError
from distlm.index.layout import Array, lists_header
from distlm.system_errors import told

PIECE = 16 << 20
"""Bytes read at once where they are only looked at."""
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

    @cached_property
    def rows(self) -> list[int]:
        """Keys of each part."""
        return [int(own.sum()) for own in self.sizes]

    @property
    def bytes(self) -> int:
        """Size of the merged file."""
        return int(self.offsets[-1])

    def units(self, unit_bytes: int) -> list[tuple[int, int]]:
        """Byte ranges [low, high) of the merged file, of `unit_bytes` each but for the last."""
        return [(low, min(low + unit_bytes, self.bytes)) for low in range(0, self.bytes, unit_bytes)]

    def lists_of(self, low: int, high: int) -> tuple[int, int]:
        """The lists [first, last) that have bytes in [low, high) of the merged file."""
        first = int(np.searchsorted(self.offsets, low, side="right")) - 1
        return max(0, first), int(np.searchsorted(self.offsets[:-1], high, side="left"))

    def segments(self, first: int, last: int) -> Iterator[tuple[int, Array, Array]]:
        """Where the lists [first, last) of each part go: (part, starts, stops), int64 [2 × lists] offsets in the merged
        file of the codes and the ids of each list in turn. They follow one another in the part from
        `part_offsets[part, first]` on."""
        sizes = self.sizes[:, first:last]
        code_at = self.offsets[first:last].copy()
        id_at = code_at + sizes.sum(axis=0) * self.code_size
        for part, own in enumerate(sizes):
            starts = np.stack([code_at, id_at], axis=1).ravel()
            yield part, starts, starts + (own[:, None] * np.array([self.code_size, 8])).ravel()
            code_at += own * self.code_size
            id_at += own * 8


def assemble(layout: MergeLayout, low: int, high: int, buffer: Array) -> Array:
    """Bytes [low, high) of the merged file: its head, and for each list the codes of all parts, then the ids.

    Returns the part of `buffer` uint8 that they fill. Each byte is read to its place at once.
    """
    whole = buffer[: high - low]
    if low < len(layout.start):
        head = np.frombuffer(layout.start[low:high], np.uint8)
        whole[: len(head)] = head
    first, last = layout.lists_of(low, high)
    for part, starts, stops in layout.segments(first, last):
        # What lies before `low` is where the part begins, what lies beyond `high` where it ends.
        skipped = int((np.minimum(stops, low) - np.minimum(starts, low)).sum())
        pieces = [whole[start:stop] for start, stop in _inside(starts, stops, low, high)]
        if pieces:
            _read_scattered(layout.paths[part], int(layout.part_offsets[part, first]) + skipped, pieces)
    if any(layout.shifts):
        for part, ids in _ids_of_parts(layout, low, high, whole):
            for piece in ids:
                piece += layout.shifts[part]
        for edge in (low, high):
            _shift_cut(layout, edge, low, high, whole)
    return whole


def unit_ids(layout: MergeLayout, low: int, high: int, whole: Array) -> Iterator[tuple[int, Array]]:
    """(part, ids int64) of the ids that begin in the bytes [low, high) of the merged file, which are `whole` uint8."""
    cut = _cut_id(layout, high)
    for part, ids in _ids_of_parts(layout, low, high, whole):
        if cut is not None and cut[0] == part and cut[1] >= low:
            ids.append(np.array([cut[2]], "<i8"))
        if ids:
            yield part, np.concatenate(ids)


def _inside(starts: Array, stops: Array, low: int, high: int) -> Iterator[tuple[int, int]]:
    """The segments cut to [low, high), from `low` on; none that are empty."""
    starts, stops = np.clip(starts, low, high) - low, np.clip(stops, low, high) - low
    filled = np.flatnonzero(stops > starts)
    return zip(starts[filled].tolist(), stops[filled].tolist(), strict=True)


def _ids_of_parts(layout: MergeLayout, low: int, high: int, whole: Array) -> Iterator[tuple[int, list[Array]]]:
    """(part, views int64 of `whole`): the ids that lie in [low, high) with all their bytes."""
    for part, starts, stops in layout.segments(*layout.lists_of(low, high)):
        starts, stops = starts[1::2], stops[1::2]
        # Ends of a unit follow the file system's blocks, so an id may lie across one.
        first = starts + -(-np.maximum(low - starts, 0) // 8) * 8
        last = stops - -(-np.maximum(stops - high, 0) // 8) * 8
        filled = np.flatnonzero(last > first)
        yield (
            part,
            [
                whole[start - low : stop - low].view("<i8")
                for start, stop in zip(first[filled].tolist(), last[filled].tolist(), strict=True)
            ],
        )


def _cut_id(layout: MergeLayout, edge: int) -> tuple[int, int, int] | None:
    """(part, offset in the merged file, value in the merged file) of the id that lies across `edge`, if one does."""
    if not len(layout.start) < edge < layout.bytes:
        return None
    first, last = layout.lists_of(edge, edge + 1)
    for part, starts, stops in layout.segments(first, last):
        start, stop = int(starts[-1]), int(stops[-1])
        if start < edge < stop and (edge - start) % 8:
            place = (edge - start) // 8 * 8
            source = int(layout.part_offsets[part, last]) - (stop - start) + place
            value = int.from_bytes(read_at(layout.paths[part], source, 8), "little", signed=True)
            return part, start + place, value + (layout.shifts[part] if layout.shifts else 0)
    return None


def _shift_cut(layout: MergeLayout, edge: int, low: int, high: int, whole: Array) -> None:
    """Put the shifted id that lies across an edge of [low, high) into `whole`, as far as it lies there."""
    if (cut := _cut_id(layout, edge)) is not None:
        _, place, value = cut
        data = np.frombuffer(value.to_bytes(8, "little", signed=True), np.uint8)
        start, stop = max(place, low), min(place + 8, high)
        whole[start - low : stop - low] = data[start - place : stop - place]


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


def read_pieces(path: Path, offset: int, count: int) -> Iterator[bytes]:
    """The same bytes as `read_at`, PIECE at a time."""
    for start in range(0, count, PIECE):
        yield read_at(path, offset + start, min(PIECE, count - start))


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
