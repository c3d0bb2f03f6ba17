"""Markers of whole folders: bytes and checksum of each file, in a checkpoint's complete.json or beside other facts.

Without torch.
"""

from collections.abc import Iterable
from pathlib import Path

from distlm.errors import DistlmError
from distlm.models.records import Complete, MarkedFile, Marker
from distlm.runtime.files import file_hash
from distlm.system_errors import system_error

MEMORY = "memory-"
"""How the names of the files of memories' values begin, with the layer's number behind it."""


def listing(files: Iterable[Path]) -> dict[str, MarkedFile]:
    """What a marker has as "files"; reads all of them once."""
    return {path.name: MarkedFile(path.stat().st_size, file_hash(path)) for path in files}


def check_files(folder: Path, mend: str, prefix: str = "", marker: type[Marker] = Complete) -> list[str]:
    """Names of the files that begin with `prefix`, after comparing each with the marker; reads all of them once.

    Raises DistlmError when the marker is missing or a file cannot be read, and, ending in `mend`, when one is missing
    or is not as it was written.
    """
    files = _files(folder, prefix, marker)
    for name, facts in files.items():
        path = folder / name
        try:
            size = path.stat().st_size if path.exists() else None
            whole = size == facts.bytes and file_hash(path) == facts.hash
        except OSError as error:
            raise system_error(error, path) from error
        if not whole:
            found = "missing" if size is None else f"{size} bytes" if size != facts.bytes else "other content"
            raise DistlmError(f"{path}: damaged ({found}, {facts.bytes} bytes were written); {mend}")
    return list(files)


def marked_hashes(folder: Path, prefix: str, marker: type[Marker] = Complete) -> dict[str, str]:
    """Name → checksum, by the marker, of the files that begin with `prefix`. Raises DistlmError without a marker."""
    return {name: facts.hash for name, facts in _files(folder, prefix, marker).items()}


def memory_files(folder: Path, marker: type[Marker] = Complete) -> dict[str, str]:
    """Name → checksum of the files of the memories' values, which the fingerprint of a masked model leaves out. Raises
    DistlmError without a marker."""
    return marked_hashes(folder, MEMORY, marker)


def _files(folder: Path, prefix: str, marker: type[Marker]) -> dict[str, MarkedFile]:
    files = marker.read(folder / marker.NAME).files
    return {name: facts for name, facts in files.items() if name.startswith(prefix)}
