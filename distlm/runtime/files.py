"""Files that are whole or absent: written beside their place, fsynced, renamed; checksums; free disk."""

import contextlib
import json
import math
import os
import shutil
import socket
import stat
import time
import tokenize
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from distlm.errors import DistlmError
from distlm.system_errors import told

if TYPE_CHECKING:
    import numpy.typing as npt

_CHUNK = 8 << 20
_DAY_S = 86400


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder; renamed to `path` when the block ends without an error.

    The data is fsynced before the rename, the folder after it, so that a crash leaves the old file or the new one.
    Raises DistlmError, naming the file and the system's reason, when it cannot be written, and for what is there and
    is no file: a device would be replaced by one.
    """
    with told(path):
        refuse_no_file(path, "something is to be written there")
        path.parent.mkdir(parents=True, exist_ok=True)
    sweep_abandoned(path)
    # Processes of several nodes may write the same file at once (shares), and have equal process ids.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with told(path, temporary):
            yield temporary
            sync_file(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        # Where the folder cannot be written, the first error has said so already.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sweep_abandoned(path: Path) -> None:
    """Remove what writers of a file left who were killed, or could not remove it: those of this node that are gone, and
    any of more than a day ago. Others may be writing the same file. What is left while this process runs is for the
    next one to remove."""
    own = f".{path.name}."
    for name in _leftovers(path.parent):
        if not name.startswith(own):
            continue
        leftover = path.with_name(name)
        node, _, process = name.removeprefix(own).removesuffix(".tmp").rpartition(".")
        gone = node == socket.gethostname() and process.isdigit() and not _lives(int(process))
        with contextlib.suppress(OSError):
            if gone or time.time() - leftover.stat().st_mtime > _DAY_S:
                leftover.unlink()


_seen: dict[tuple[int, Path], list[str]] = {}


def _leftovers(folder: Path) -> list[str]:
    """Names of the temporaries that were there when this process first wrote into the folder.

    The folder is listed once: listing it at each of U writes would read U² entries, and a file server gives out some
    hundred at a time."""
    # A forked process is another one.
    key = os.getpid(), folder.absolute()
    if key not in _seen:
        _seen[key] = []
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            _seen[key] = [entry.name for entry in entries if entry.name[0] == "." and entry.name.endswith(".tmp")]
    return _seen[key]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # Somebody else's.
        pass
    return True


def sync_file(path: Path) -> None:
    """Flush a file's data to the disk; whoever may read other new files of the folder may read it, too."""
    mode = stat.S_IMODE(path.stat().st_mode)
    # safetensors makes files that the owner alone can read. What others may do is up to umask, or the folder's ACL.
    if not mode & 0o077 and (usual := _mode_of_new_files(path)) != mode:
        path.chmod(usual)
    _flush(path)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (renames, new files) to the disk."""
    _flush(folder)


def _mode_of_new_files(beside: Path) -> int:
    probe = beside.with_name(f"{beside.name}.mode.tmp")
    try:
        probe.touch()
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the given order, so that equal content gives equal bytes.

    Raises DistlmError naming the file and the entry that is not finite: JSON has no NaN, and a figure that does not
    exist is null.
    """
    if found := unreadable(value):
        raise DistlmError(f"{path}: not written: {found}; the numbers that it was computed from are not finite, either")
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def save_array(path: Path, array: "npt.ArrayLike") -> None:
    """Write a .npy file as numpy.save does, in C order.

    By Python's writes: numpy writes through a stream of C and does not look at how its end went, so that the last
    kilobytes are missing after a full disk, and nobody is told. Raises OSError.
    """
    import numpy as np

    whole = np.asarray(array, order="C")
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(whole))
        stream.write(whole.data)


def order_metadata(path: Path) -> None:
    """Sort the metadata in the head of a safetensors file: its library writes them in another order in each process,
    and equal content is to give equal bytes. Raises OSError."""
    with path.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        head = json.loads(stream.read(size))
        # Of the same length, as the same entries are in it.
        head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
        text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        stream.seek(8)
        stream.write(text)


def read_json(path: Path, what: str) -> Any:
    """Read JSON. Raises DistlmError naming the file when it is missing, no file, cut, or has an entry twice."""
    if not path.exists():
        raise DistlmError(f"{path}: no such file ({what})")
    refuse_no_file(path, what)
    try:
        return json_of(path.read_text("utf-8"))
    except ValueError as error:
        raise DistlmError(f"{path}: not valid JSON ({what}): {error}; delete it and run the stage again") from error


def refuse_no_file(path: Path, what: str) -> None:
    """Raises DistlmError for a folder, a pipe (which would be waited for) or a device in the place of a file; nothing
    where there is nothing."""
    if not path.is_file() and path.exists():
        kind = "a folder" if path.is_dir() else "a pipe" if path.is_fifo() else "a device or socket"
        raise DistlmError(f"{path}: is {kind}, and a file is needed there ({what}); remove it or choose another")


def load_array(path: Path, mapped: bool = True) -> "npt.NDArray[Any]":
    """The array of a .npy file, memory-mapped or in memory.

    Raises OSError for a file that cannot be opened, DistlmError for what is no file, ValueError for anything that is no
    such array: numpy has an error of its own for each.
    """
    import numpy as np

    refuse_no_file(path, ".npy")
    try:
        found = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (EOFError, zipfile.BadZipFile, OverflowError, SyntaxError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(found, np.ndarray):
        raise ValueError("an archive of arrays (.npz)")
    return found


def json_of(text: str | bytes) -> Any:
    """JSON of a text. Raises ValueError that says what is wrong with it; of two equal keys one would be lost."""
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the entry {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


_LARGEST = 2**64
"""What 64 bits do not hold."""


def unreadable(value: Any, place: str = "") -> str:
    """The first entry of a JSON tree that no record has: a number that is not finite or beyond 64 bits, or a text that
    is no UTF-8; with its place, `a.b[3]`. Empty: there is none."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if found := unreadable(key, f"a key of {place or 'it'}") or unreadable(inner, f"{place}.{key}".lstrip(".")):
                return found
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            if found := unreadable(inner, f"{place}[{number}]"):
                return found
    elif (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= _LARGEST):
        return f"{place} is {value:.3g}, no number that can be recorded"
    elif isinstance(value, str) and not value.isascii() and max(value) >= "\ud800" and not _is_utf8(value):
        return f"{place} is {value[:50]!a}, which is no UTF-8"
    return ""


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class Hasher(Protocol):
    """A checksum in the making."""

    def update(self, data: Any, /) -> object:
        """Take the next bytes."""

    def hexdigest(self) -> str:
        """Of all that was given."""


class PiecesHasher:
    """The checksum of join_hashes, of bytes in order."""

    def __init__(self, piece_bytes: int) -> None:
        self._bytes, self._left = piece_bytes, piece_bytes
        self._piece, self._done = xxhash.xxh3_128(), list[str]()

    def update(self, data: Any, /) -> None:
        """Take the next bytes."""
        rest = memoryview(data).cast("B")
        while len(rest):
            if not self._left:
                self._done.append(self._piece.hexdigest())
                self._piece, self._left = xxhash.xxh3_128(), self._bytes
            taken = rest[: self._left]
            self._piece.update(taken)
            self._left -= len(taken)
            rest = rest[len(taken) :]

    def hexdigest(self) -> str:
        """Of all that was given."""
        return join_hashes([*self._done, self._piece.hexdigest()], self._bytes)


def join_hashes(pieces: Sequence[str], piece_bytes: int) -> str:
    """The checksum of a file that several processes write: `BYTES_HASH`, from the xxh3-128 of each of its pieces of so
    many bytes (the last may be shorter), in order. No xxh3 of the whole can be made of those of its pieces."""
    return f"{piece_bytes}_{bytes_hash(''.join(pieces).encode())}"


def hasher_like(known: str) -> Hasher:
    """A checksum of the kind of `known`: xxh3-128, or of pieces (join_hashes)."""
    size, _, pieces = known.rpartition("_")
    return PiecesHasher(int(size)) if pieces and size.isdigit() and int(size) else xxhash.xxh3_128()


def file_hash(path: Path, like: str = "") -> str:
    """xxh3-128 of a file's bytes, as 32 hex digits, or its checksum of the kind of `like` (hasher_like).

    Raises DistlmError for what is there and is no file.
    """
    refuse_no_file(path, "whose checksum is known")
    digest = hasher_like(like)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def bytes_hash(data: bytes) -> str:
    """xxh3-128 of bytes, as 32 hex digits."""
    return xxhash.xxh3_128(data).hexdigest()


def json_hash(value: Any) -> str:
    """xxh3-128 of a JSON value with sorted keys: a fingerprint of settings."""
    return bytes_hash(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def cache_place(variable: str, name: str) -> Path | None:
    """Where something is kept for the user's later starts: the path that an environment variable gives, else `name` in
    distlm's folder of their cache; None where the variable is empty, or the user has no home on this node."""
    given = os.environ.get(variable)
    if given is not None:
        return Path(given) if given else None
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return home / "distlm" / name


def sweep_temporaries(folder: Path, of: str = "") -> None:
    """Remove what killed writers left behind, of all files or of the file named `of`.

    Call on one rank before the others write.
    """
    for leftover in folder.glob(f".{of}*.tmp"):
        leftover.unlink(missing_ok=True)


def bytes_below(folder: Path, suffix: str = "") -> int:
    """Bytes of the files below a folder whose names end so. A process that still writes there, as the ranks of a
    launcher that was just killed, may rename and remove files meanwhile: those that vanish count nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith(suffix):
                with contextlib.suppress(FileNotFoundError):
                    total += (Path(place) / name).lstat().st_size
    return total


def require_free_disk(folder: Path, needed: int, what: str) -> None:
    """DistlmError when the file system of `folder` has less than `needed` bytes (plus 1 %) free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed * 1.01:
        raise DistlmError(
            f"{folder}: {what} needs {format_bytes(needed)} and the disk has {format_bytes(free)} free; "
            f"free {format_bytes(int(needed * 1.01) - free)} or choose another place with run_dir="
        )


def format_bytes(count: float) -> str:
    """1536 → '1.5 kB' (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
