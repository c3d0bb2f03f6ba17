"""Copies on each node's own disk of the files that a stage reads at random: made once a node, checked, removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from distlm.errors import DistlmError
from distlm.runtime.checked import Written, difference, remember, unreadable
from distlm.runtime.files import bytes_hash, format_bytes, hasher_like
from distlm.runtime.local.place import Place, asked_place, expanded, identity
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.stop import StopFlag
from distlm.system_errors import told

if TYPE_CHECKING:
    from distlm.runtime.stage import Stage

_CHUNK = 8 << 20
Copies = Mapping[Path, Path]
"""File → its copy on this node; what has none is read where it lies."""


@dataclass(frozen=True)
class Wanted:
    """Files of a folder that are to be copied."""

    root: Path
    """What is remembered of them is kept by this folder (runtime/checked.py)."""
    files: Sequence[Written]
    readers: Mapping[Path, int] = field(default_factory=dict)
    """File → the one rank that reads it; of all others every node has a copy."""


def read_in_place(files: Iterable[Written], wanted: Sequence[Wanted]) -> list[Written]:
    """Those of `files` that are not copied, so that nothing has compared them yet."""
    apart = {file.path for group in wanted for file in group.files}
    return [file for file in files if file.path not in apart]


@contextmanager
def copied(stage: Stage, work: str, wanted: Sequence[Wanted]) -> Iterator[Copies]:
    """For the block, copies of the `wanted` files on the disk of each node, in the folder of launch.stage_in; then they
    are removed. Collective; `wanted` is the same on every rank, and `work` says what reads them ("index add").

    The first rank of each node copies, several nodes at once, and compares the bytes with their checksums on the way
    (not with launch.verify=false); the others wait. What a killed start of the same work has left is read again and
    taken where it is whole. Raises DistlmError on every rank for a folder without room or right to write and for a file
    that is missing or not as it was written, Busy while another process has these copies, and Stopped.
    """
    if not any(group.files for group in wanted):
        yield {}
        return
    comm, node = stage.comm, stage.world.node
    # Not every launcher hands the environment on.
    setting = comm.bcast(asked_place(stage.config.launch.stage_in))
    root = together(comm, lambda: expanded(setting, node))
    nodes = comm.allgather(identity(root, node))
    ours = {rank for rank, each in enumerate(nodes) if each == nodes[comm.rank]}
    place, first = Place(root, node, _id(stage, work)), min(ours)
    files = [file for group in wanted for file in group.files if group.readers.get(file.path, first) in ours]
    with _claimed(comm, place, comm.rank == first):
        missing = together(comm, lambda: place.missing(files) if comm.rank == first else [])
        needed = together(comm, lambda: sum(map(_size, missing)))
        together(comm, lambda: place.require_room(needed, setting))
        _copy_all(stage, work, place, missing, needed)
        if stage.config.launch.verify:
            # Of what a killed start has left only the copy is known to be whole.
            done = set().union(*comm.allgather({file.path for file in missing}))
            rank0_first(comm, lambda: _remember(wanted, done))
        yield {file.path: place.copy_of(file) for file in files}
        # Nobody reads any more.
        comm.barrier()


def _id(stage: Stage, work: str) -> str:
    """The same for each start of the same work of the same run."""
    run, launch = stage.run, stage.config.launch
    return bytes_hash("\0".join([work, str(run.root.resolve()), str(run.index), run.label, launch.share]).encode())[:16]


@contextmanager
def _claimed(comm: Comm, place: Place, first: bool) -> Iterator[None]:
    """The node's folder, held by its first rank, and removed by it: after an error or a stop, too."""
    locks: list[TextIO] = []
    try:
        together(comm, lambda: locks.append(place.claim()) if first else None)
        yield
    finally:
        for lock in locks:
            place.release(lock)


def _copy_all(stage: Stage, work: str, place: Place, missing: Sequence[Written], needed: int) -> None:
    """The `missing` files of every node, each node's one after the other; `needed` bytes of them are this rank's."""
    comm, verify = stage.comm, stage.config.launch.verify
    copying = comm.allgather(len(missing))
    with Progress(f"{work}: copying to {place.root}", needed, "bytes", comm.rank) as progress:
        for turn in range(max(copying)):
            stage.stop.check(comm, work)
            together(comm, partial(_copy, missing[turn : turn + 1], place, stage.stop, progress.advance, verify))
    stage.stop.check(comm, work)
    if any(copying):
        nodes = sum(map(bool, copying))
        say(f"{work}: {format_bytes(needed)} copied to {place.root}; nodes that copied: {nodes}", comm.rank)


def _copy(files: Sequence[Written], place: Place, stop: StopFlag, advance: Callable[[int], None], verify: bool) -> None:
    """Copy files and compare the bytes with their checksums. One that a stop breaks off is no copy."""
    for file in files:
        target, digest = place.copy_of(file), hasher_like(file.hash)
        temporary = target.with_name(f".{target.name}.tmp")
        with told(temporary), temporary.open("wb") as sink:
            for chunk in _chunks(file):
                if stop.reason is not None:
                    return
                digest.update(chunk)
                sink.write(chunk)
                advance(len(chunk))
        if verify and (problem := difference(file, digest.hexdigest())):
            raise DistlmError(problem)
        temporary.replace(target)


def _chunks(file: Written) -> Iterator[bytes]:
    try:
        with file.path.open("rb") as source:
            while chunk := source.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise DistlmError(unreadable(file, error)) from error


def _size(file: Written) -> int:
    try:
        return file.path.stat().st_size
    except OSError as error:
        raise DistlmError(unreadable(file, error)) from error


def _remember(wanted: Sequence[Wanted], done: set[Path]) -> None:
    for group in wanted:
        remember(group.root, [file for file in group.files if file.path in done])
