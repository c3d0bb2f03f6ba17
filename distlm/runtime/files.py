"""Files that are whole or absent: written beside their place, fsynced, renamed; checksums; free disk."""

import contextlib
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    Raises DistlmError, naming the file and the system's reason, when it cannot be written.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_abandoned(path)
    # Processes of several nodes may write the same file at once (shares), and have equal process ids.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with told(path, temporary):
            yield temporary
            sync_file(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        # Of a folder that cannot be written the first error says so.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sweep_abandoned(path: Path) -> None:
    """Remove what writers of a file left who were killed, or could not remove it: those of this node that are gone, and
    any of more than a day ago. Others may be writing the same file."""
    own = f".{path.name}."
    with contextlib.suppress(OSError):
        for leftover in path.parent.iterdir():
            if not (leftover.name.startswith(own) and leftover.suffix == ".tmp"):
                continue
            node, _, process = leftover.name.removeprefix(own).removesuffix(".tmp").rpartition(".")
            gone = node == socket.gethostname() and process.isdigit() and not _lives(int(process))
            if gone or time.time() - leftover.stat().st_mtime > _DAY_S:
                leftover.unlink()


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
    """Write JSON atomically, keys in the given order, so that equal content gives equal bytes."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


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
    """Read JSON; DistlmError naming the file when it is missing or cut."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DistlmError(f"{path}: no such file ({what})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DistlmError(f"{path}: not valid JSON ({what}): {error}; delete it and run the stage again") from error


def file_hash(path: Path) -> str:
    """xxh3-128 of a file's bytes, as 32 hex digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def bytes_hash(data: bytes) -> str:
    """xxh3-128 of bytes, as 32 hex digits."""
    return xxhash.xxh3_128(data).hexdigest()


def json_hash(value: Any) -> str:
    """xxh3-128 of a JSON value with sorted keys: a fingerprint of settings."""
    return bytes_hash(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


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
