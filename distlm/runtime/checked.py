"""Files against the checksums that were kept when they were written, before a stage reads them.

What was found whole is remembered by size, time of change and inode, for the files of a folder together, so that a
store is read once for it and not by every stage. The memory is a folder of small files, DISTLM_CHECKED or
~/.cache/distlm/checked; DISTLM_CHECKED= (empty) keeps none. A byte that rots after that without a trace in the file
system is found by `distlm verify`, which reads everything, and by every stage some weeks later (KEPT_S).
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distlm.errors import DistlmError
from distlm.runtime.files import bytes_hash, cache_place, file_hash
from distlm.runtime.progress import Progress
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.records import CheckedFile, CheckedFolder
from distlm.system_errors import system_error

VARIABLE = "DISTLM_CHECKED"
KEPT_S = 30 * 86400
"""So long a file is taken to be as it was found."""


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    path: Path
    hash: str
    """Its checksum: xxh3-128 of its bytes, or of its pieces (runtime/files.py, join_hashes)."""
    mend: str
    """What helps when it is missing or other."""


def problem(file: Written) -> str:
    """What is wrong with a file, with its path; empty: nothing. Reads all of it."""
    try:
        return difference(file, file_hash(file.path, file.hash))
    except DistlmError as error:
        return str(error)
    except OSError as error:
        return unreadable(file, error)


def difference(file: Written, found: str) -> str:
    """What is wrong with a file whose bytes have the checksum `found`; empty: nothing."""
    if found == file.hash:
        return ""
    return f"{file.path}: damaged: its checksum is {found}, {file.hash} was written; {file.mend}"


def unreadable(file: Written, error: OSError) -> str:
    """That a file could not be read."""
    if isinstance(error, FileNotFoundError):
        return f"{file.path}: missing; {file.mend}"
    return str(system_error(error, file.path))


def require_whole(comm: Comm, root: Path, files: Sequence[Written], label: str) -> None:
    """Read the files below `root` that are not known to be whole, each on one rank, and remember them. Collective.

    Raises DistlmError on every rank for the first one that is missing or not as it was written.
    """
    pending = rank0_first(comm, lambda: _unknown(root, files))
    if not pending:
        return
    sizes = rank0_first(comm, lambda: [_size(file.path) for file in pending])
    with Progress(f"{label}: checksums", sum(sizes), "bytes", comm.rank, every_s=_SELDOM_S) as progress:
        for first in range(0, len(pending), comm.size):
            turn = pending[first : first + comm.size]
            together(comm, lambda turn=turn: _refuse_damaged(turn[comm.rank : comm.rank + 1]))  # type: ignore[misc]
            progress.advance(sum(sizes[first : first + comm.size]))
    rank0_first(comm, lambda: remember(root, pending))


_SELDOM_S = 10.0


def _refuse_damaged(files: Iterable[Written]) -> None:
    for file in files:
        if found := problem(file):
            raise DistlmError(found)


def _unknown(root: Path, files: Sequence[Written]) -> list[Written]:
    """Those that were not found whole lately, or have changed since."""
    known = {one.name: one for one in _read(root)}
    now = time.time()
    return [
        file for file in files
        if (one := known.get(_name(root, file))) is None
        or (one.bytes, one.changed_ns, one.inode, one.hash) != (*_state(file.path), file.hash)
        or now - one.at > KEPT_S
    ]  # fmt: skip


def remember(root: Path, files: Iterable[Written]) -> None:
    """Keep that these files below `root` were found whole, for later stages. On one rank."""
    place = _place(root)
    if place is None:
        return
    at = round(time.time())
    found = {
        name: CheckedFile(name, *_state(file.path), file.hash, at) for file in files if (name := _name(root, file))
    }
    others = [one for one in _read(root) if one.name not in found and at - one.at <= KEPT_S]
    try:
        CheckedFolder(folder=os.path.realpath(root), files=[*others, *found.values()]).write(place)
    except DistlmError:
        # It is a convenience: the files are read again the next time.
        return


def _read(root: Path) -> list[CheckedFile]:
    place = _place(root)
    found = CheckedFolder.peek(place) if place is not None else None
    return found.files if found is not None and found.folder == os.path.realpath(root) else []


def _name(root: Path, file: Written) -> str:
    return os.path.relpath(file.path, root)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _state(path: Path) -> tuple[int, int, int]:
    """Bytes, time of the last change in nanoseconds, inode; for a missing file, values that no file has."""
    try:
        found = path.stat()
    except OSError:
        return -1, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_ino


def _place(root: Path) -> Path | None:
    home = cache_place(VARIABLE, "checked")
    return home / f"{bytes_hash(os.fsencode(os.path.realpath(root)))}.json" if home is not None else None
