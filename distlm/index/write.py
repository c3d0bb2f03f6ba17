"""Writes a merged index: all ranks into one file, at exact offsets. The unit of work is a range of lists."""

import os
from math import ceil
from pathlib import Path

from distlm.errors import DistlmError
from distlm.index.copy import MergeLayout, copy_unit, disk_error, hash_in_order, preallocate, write_at
from distlm.runtime.collective import rank0_first, together
from distlm.runtime.comm import Comm
from distlm.runtime.files import bytes_hash, require_free_disk
from distlm.runtime.progress import Progress
from distlm.runtime.stop import StopFlag

UNIT_BYTES = 64 << 20
"""Output of one unit; a rank holds about twice this."""


def write_merged(comm: Comm, stop: StopFlag, layout: MergeLayout, path: Path, unit_bytes: int) -> str:
    """Fill the file `path` from all ranks and read it back on rank 0; its xxh3-128. Collective.

    Memory: about twice `unit_bytes` on each rank. Raises DistlmError for a full disk, a part that changed meanwhile,
    and a file system that lost writes.
    """
    units = layout.units(unit_bytes)
    rank0_first(comm, lambda: _create(path, layout))
    written: dict[int, str] = {}
    output = os.open(path, os.O_WRONLY)
    try:
        with Progress("index merge", layout.bytes, "bytes", comm.rank, done=len(layout.start)) as progress:
            for turn in range(ceil(len(units) / comm.size)):
                stop.check(comm, "index merge (it starts over from the parts)")
                first = turn * comm.size
                mine = units[first + comm.rank : first + comm.rank + 1]

                def copy(mine: list[tuple[int, int]] = mine) -> list[str]:
                    return [copy_unit(layout, low, high, output, unit_bytes) for low, high in mine]

                for digest in together(comm, copy):
                    written[first + comm.rank] = digest
                done = units[first : first + comm.size]
                progress.advance(int(layout.offsets[done[-1][1]] - layout.offsets[done[0][0]]))
        together(comm, lambda: _flush(output))
    finally:
        os.close(output)
    digests = {unit: digest for share in comm.allgather(written) for unit, digest in share.items()}
    pieces = [(len(layout.start), bytes_hash(layout.start))]
    pieces += [
        (int(layout.offsets[high] - layout.offsets[low]), digests[unit]) for unit, (low, high) in enumerate(units)
    ]
    return rank0_first(comm, lambda: _read_back(path, layout, pieces))


def _create(path: Path, layout: MergeLayout) -> None:
    path.unlink(missing_ok=True)
    require_free_disk(path.parent, layout.bytes, "the merged index")
    preallocate(path, layout.bytes)
    output = os.open(path, os.O_WRONLY)
    try:
        write_at(output, layout.start, 0)
        _flush(output)
    finally:
        os.close(output)


def _flush(output: int) -> None:
    try:
        os.fsync(output)
    except OSError as error:
        raise disk_error(error) from error


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
