"""Writes a merged index: all ranks into one file, at exact offsets. The unit of work is a range of its bytes.

Each rank writes a range of its own, in units whose edges are multiples of their size: no two nodes write into one block
of the file system, which is where shared file systems lose writes. A unit is hashed while it is in memory; nobody reads
back what another wrote.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from distlm.errors import DistlmError
from distlm.index.layout import Array
from distlm.index.merge.copy import MergeLayout, assemble, preallocate, read_at, write_at
from distlm.index.merge.journal import Journal
from distlm.runtime.files import join_hashes, require_free_disk
from distlm.runtime.progress import Progress
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.stop import StopFlag
from distlm.system_errors import told

UNIT_BYTES = 32 << 20
"""Output of one unit, a power of two. A rank holds the one that is written and the next one."""
ROUND_UNITS = 4
"""Units of a rank between two agreements of the ranks; a merge that is killed loses at most the last round, and what
the journal waits for."""
EDGE = 64 << 10
"""Bytes at both ends of a unit that are compared in the end: more than a page of any file system."""


class Check(Protocol):
    """What is checked of units while their bytes are in memory."""

    def unit(self, layout: MergeLayout, low: int, high: int, whole: Array, copied: bool) -> None:
        """Look at bytes [low, high) of the merged file, `whole` uint8; copied: from the parts just now, and not what an
        earlier start had written. Raises DistlmError."""


def write_merged(
    comm: Comm, stop: StopFlag, layout: MergeLayout, path: Path, unit_bytes: int, check: Check | None = None
) -> str:
    """Fill the file `path` from all ranks; its checksum, of pieces of `unit_bytes` (join_hashes). Collective.

    A unit is put together and checked while the one before is written. A start after one that was stopped or killed,
    on any number of ranks, writes only the units that are missing or do not read as they were written. Memory: twice
    `unit_bytes` on each rank. Raises DistlmError for a full disk, a part that changed meanwhile, what `check` finds,
    and a file system that lost writes.
    """
    units = layout.units(unit_bytes)
    journal = rank0_first(comm, lambda: Journal(path, layout, unit_bytes))
    digests = rank0_first(comm, journal.load)
    if digests:
        digests = _still_there(comm, layout, path, units, digests, check)
    else:
        rank0_first(comm, lambda: _create(path, layout, journal))
    pending = [unit for unit in range(len(units)) if unit not in digests]
    edges = np.linspace(0, len(pending), comm.size + 1).astype(int).tolist()
    mine = pending[edges[comm.rank] : edges[comm.rank + 1]]
    rounds = -(-int(np.diff(edges).max()) // ROUND_UNITS)
    output = os.open(path, os.O_WRONLY)
    try:
        done = sum(units[unit][1] - units[unit][0] for unit in digests)
        with (
            Progress("index merge", layout.bytes, "bytes", comm.rank, done=done) as progress,
            UnitWriter(layout, output, check) as writer,
        ):
            for turn in range(rounds):
                stop.check(comm, "index merge")
                own = mine[turn * ROUND_UNITS : (turn + 1) * ROUND_UNITS]

                def copy(own: list[int] = own) -> None:
                    with told(path):
                        for unit in own:
                            writer.copy(unit, *units[unit])

                together(comm, copy)
                written = _digests_of_all(comm, writer.take())
                digests |= written
                if comm.rank == 0:
                    journal.save(digests)
                progress.advance(sum(units[unit][1] - units[unit][0] for unit in written))
            together(comm, partial(_told, path, writer.finish))
        digests |= _digests_of_all(comm, writer.take())
        together(comm, partial(_told, path, lambda: os.fsync(output)))
    finally:
        os.close(output)
    # The next start writes anew what does not read back.
    rank0_first(comm, journal.remove)
    lost = comm.allgather(together(comm, lambda: _lost_units(path, writer.edges)))
    rank0_first(comm, lambda: _refuse_lost(path, layout, [unit for share in lost for unit in share], len(units)))
    return join_hashes([digests[unit] for unit in range(len(units))], unit_bytes)


def _still_there(
    comm: Comm,
    layout: MergeLayout,
    path: Path,
    units: list[tuple[int, int]],
    digests: Mapping[int, str],
    check: Check | None,
) -> dict[int, str]:
    """Those units of an earlier start that read as they were written: after a crash of the machine not all do."""
    written = sorted(digests)
    mine = written[comm.rank :: comm.size]

    def look() -> dict[int, str]:
        found = {}
        for unit in mine:
            low, high = units[unit]
            whole = np.frombuffer(read_at(path, low, high - low), np.uint8)
            if xxhash.xxh3_128(whole.data).hexdigest() == digests[unit]:
                found[unit] = digests[unit]
                if check is not None:
                    check.unit(layout, low, high, whole, copied=False)
        return found

    return _digests_of_all(comm, together(comm, look))


def _digests_of_all(comm: Comm, mine: dict[int, str]) -> dict[int, str]:
    """The digests of all ranks. Collective."""
    return {unit: digest for share in comm.allgather(mine) for unit, digest in share.items()}


@dataclass(frozen=True)
class Edges:
    """The ends of a unit, as they were written."""

    unit: int
    places: tuple[tuple[int, int], ...]
    """(offset, bytes) in the file."""
    hashes: tuple[int, ...]


class UnitWriter:
    """Copies units to their places: one is written by a thread while the next is put together."""

    def __init__(self, layout: MergeLayout, output: int, check: Check | None) -> None:
        self._digests: dict[int, str] = {}
        self.edges: list[Edges] = []
        self._layout, self._output, self._check = layout, output, check
        # One is written while the other is filled.
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._pool = ThreadPoolExecutor(1)
        self._waiting: tuple[int, Future[str]] | None = None

    def __enter__(self) -> "UnitWriter":
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown()

    def copy(self, unit: int, low: int, high: int) -> None:
        """Copy bytes [low, high); raises what went wrong with the unit before."""
        if len(self._buffers[0]) < high - low:
            self._buffers[0] = np.empty(high - low, np.uint8)
        whole = assemble(self._layout, low, high, self._buffers[0])
        if self._check is not None:
            self._check.unit(self._layout, low, high, whole, copied=True)
        self.finish()
        size = min(EDGE, len(whole))
        hashes = tuple(xxhash.xxh3_64_intdigest(end.data) for end in (whole[:size], whole[-size:]))
        self.edges.append(Edges(unit, ((low, size), (high - size, size)), hashes))
        self._waiting = unit, self._pool.submit(write_unit, whole, low, self._output)
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


def write_unit(buffer: Array, low: int, output: int) -> str:
    """Write `buffer` at `low` to the file descriptor `output`; its xxh3-128."""
    write_at(output, buffer.data, low)
    # The kernel begins to write now, and not when its memory is full of what is to be written.
    os.posix_fadvise(output, low, len(buffer), os.POSIX_FADV_DONTNEED)
    return str(xxhash.xxh3_128(buffer.data).hexdigest())


def _create(path: Path, layout: MergeLayout, journal: Journal) -> None:
    journal.remove()
    path.unlink(missing_ok=True)
    require_free_disk(path.parent, layout.bytes, "the merged index")
    try:
        preallocate(path, layout.bytes)
    except DistlmError:
        # Its space is what somebody else waits for.
        path.unlink(missing_ok=True)
        raise


def _told(path: Path, action: Callable[[], object]) -> None:
    with told(path):
        action()


def _lost_units(path: Path, edges: list[Edges]) -> list[int]:
    """The units of this rank whose ends are others in the file now that all ranks have written theirs."""
    with path.open("rb", buffering=0) as stream:
        found = []
        for one in edges:
            read = [os.pread(stream.fileno(), size, place) for place, size in one.places]
            if tuple(map(xxhash.xxh3_64_intdigest, read)) != one.hashes:
                found.append(one.unit)
        return found


def _refuse_lost(path: Path, layout: MergeLayout, lost: list[int], units: int) -> None:
    size = path.stat().st_size
    if lost or size != layout.bytes:
        raise DistlmError(
            f"{path}: {len(lost)} of {units} pieces do not read back as they were written ({size} "
            f"bytes, {layout.bytes} expected); the file system lost writes of some rank: run `distlm index merge` "
            "again with one rank, or on a node's own disk"
        )
