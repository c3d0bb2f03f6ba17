"""Writes a merged index: all ranks into one file, at exact offsets. The unit of work is a range of lists."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from distlm.errors import DistlmError
from distlm.index.merge.copy import (
    MergeLayout,
    assemble,
    copy_pieces,
    fits,
    hash_in_order,
    preallocate,
    write_at,
    write_unit,
)
from distlm.index.merge.journal import Journal
from distlm.runtime.files import bytes_hash, require_free_disk
from distlm.runtime.progress import Progress
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.stop import StopFlag
from distlm.system_errors import told

UNIT_BYTES = 32 << 20
"""Output of one unit. A rank holds the one it writes and the next one; a list of twice this still counts as a unit."""


def write_merged(comm: Comm, stop: StopFlag, layout: MergeLayout, path: Path, unit_bytes: int) -> str:
    """Fill the file `path` from all ranks and read it back on rank 0; its xxh3-128. Collective.

    A unit is put together while the one before is written. A start after one that was stopped or killed, on any number
    of ranks, writes only the units that are missing. Memory: two to four times `unit_bytes` on each rank. Raises
    DistlmError for a full disk, a part that changed meanwhile, and a file system that lost writes.
    """
    units = layout.units(unit_bytes)
    journal = rank0_first(comm, lambda: Journal(path, layout, unit_bytes))
    digests = rank0_first(comm, journal.load)
    if not digests:
        rank0_first(comm, lambda: _create(path, layout, journal))
    pending = [unit for unit in range(len(units)) if unit not in digests]
    before = sum(_unit_bytes(layout, units[unit]) for unit in digests)
    output = os.open(path, os.O_WRONLY)
    try:
        with (
            Progress("index merge", layout.bytes, "bytes", comm.rank, done=len(layout.start) + before) as progress,
            UnitWriter(layout, output, unit_bytes) as writer,
        ):
            for first in range(0, len(pending), comm.size):
                stop.check(comm, "index merge")
                turn = pending[first : first + comm.size]
                mine = turn[comm.rank : comm.rank + 1]

                def copy(mine: list[int] = mine) -> None:
                    with told(path):
                        for unit in mine:
                            writer.copy(unit, *units[unit])

                together(comm, copy)
                digests |= _everywhere(comm, writer.take())
                if comm.rank == 0:
                    journal.save(digests)
                progress.advance(sum(_unit_bytes(layout, units[unit]) for unit in turn))
            together(comm, lambda: _told(path, writer.finish))
        digests |= _everywhere(comm, writer.take())
        together(comm, lambda: _told(path, lambda: os.fsync(output)))
    finally:
        os.close(output)
    pieces = [(len(layout.start), bytes_hash(layout.start))]
    pieces += [(_unit_bytes(layout, lists), digests[unit]) for unit, lists in enumerate(units)]

    def check() -> str:
        # What does not read back is written again by the next start.
        journal.remove()
        return _read_back(path, layout, pieces)

    return rank0_first(comm, check)


def _unit_bytes(layout: MergeLayout, lists: tuple[int, int]) -> int:
    return int(layout.offsets[lists[1]] - layout.offsets[lists[0]])


def _everywhere(comm: Comm, mine: dict[int, str]) -> dict[int, str]:
    """The digests of all ranks. Collective."""
    return {unit: digest for share in comm.allgather(mine) for unit, digest in share.items()}


class UnitWriter:
    """Copies units to their places: one is written by a thread while the next is put together."""

    def __init__(self, layout: MergeLayout, output: int, unit_bytes: int) -> None:
        self._digests: dict[int, str] = {}
        self._layout, self._output, self._unit_bytes = layout, output, unit_bytes
        # One is written while the other is filled.
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._pool = ThreadPoolExecutor(1)
        self._waiting: tuple[int, Future[str]] | None = None

    def __enter__(self) -> "UnitWriter":
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown()

    def copy(self, unit: int, low: int, high: int) -> None:
        """Copy lists [low, high); raises what went wrong with the unit before."""
        layout = self._layout
        if not fits(layout, low, high, self._unit_bytes):
            self.finish()
            self._digests[unit] = copy_pieces(layout, low, high, self._output)
            return
        count = int(layout.offsets[high] - layout.offsets[low])
        if len(self._buffers[0]) < count:
            self._buffers[0] = np.empty(count, np.uint8)
        whole = assemble(layout, low, high, self._buffers[0])
        self.finish()
        self._waiting = unit, self._pool.submit(write_unit, layout, low, whole, self._output)
        self._buffers.reverse()

    def take(self) -> dict[int, str]:
        """xxh3-128 of each unit that was written since the last call."""
        taken, self._digests = self._digests, {}
        return taken

    def finish(self) -> None:
        """Wait for the last unit."""
        if self._waiting is not None:
            unit, digest = self._waiting
            self._waiting = None
            self._digests[unit] = digest.result()


def _create(path: Path, layout: MergeLayout, journal: Journal) -> None:
    journal.remove()
    path.unlink(missing_ok=True)
    require_free_disk(path.parent, layout.bytes, "the merged index")
    try:
        preallocate(path, layout.bytes)
        with told(path), path.open("r+b") as output:
            write_at(output.fileno(), layout.start, 0)
            os.fsync(output.fileno())
    except DistlmError:
        # Its space is what somebody else waits for.
        path.unlink(missing_ok=True)
        raise


def _told(path: Path, action: Callable[[], None]) -> None:
    with told(path):
        action()


def _read_back(path: Path, layout: MergeLayout, pieces: list[tuple[int, str]]) -> str:
    """The file's xxh3-128, after comparing it with what each rank says it wrote."""
    digest, wrong = hash_in_order(path, pieces)
    size = path.stat().st_size
    if wrong or size != layout.bytes:
        raise DistlmError(
            f"{path}: {len(wrong)} of {len(pieces)} pieces do not read back as they were written ({size} "
            f"bytes, {layout.bytes} expected); the file system lost writes of some rank: run `distlm index merge` "
            "again with one rank, or on a node's own disk"
        )
    return digest
