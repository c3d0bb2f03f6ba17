"""The folder of copies on one node: whose it is, what a killed run has left there, how much room there is.

PLACE/
  distlm-NODE-ID/          the copies of one stage of one run, each named by its checksum
  distlm-NODE-ID.lock      held as long as they are used; the kernel drops it when their owner dies

The node is in the name: should several nodes see one folder, each still has its own.
"""

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from distlm.errors import Busy, DistlmError, UsageError
from distlm.runtime.checked import Written
from distlm.runtime.files import file_hash, format_bytes
from distlm.runtime.lock import owner
from distlm.system_errors import told

SETTING = "launch.stage_in"
VARIABLE = "DISTLM_STAGE_IN"
"""Environment variable that stands for the setting where that is empty: a site says it once for all runs."""
_NAME = re.compile(r"\$(\w+|\{\w+\})")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PATIENCE_S = 5.0
"""A killed run needs a moment to die."""


def asked_place(setting: str) -> str:
    """What launch.stage_in asks for, or the environment where that is empty; empty: nothing is copied."""
    return setting or os.environ.get(VARIABLE, "")


def expanded(text: str, node: str) -> Path:
    """The folder that `text` means on this node, its variables and ~ replaced; it is made where its parent is there.

    Raises UsageError for a path that is not absolute and DistlmError for variables without a value here, for a folder
    that cannot be made or written.
    """
    empty = sorted({name for found in _NAME.findall(text) if not os.environ.get(name := found.strip("{}"))})
    if empty:
        raise DistlmError(
            f"{SETTING}={text}: {', '.join(empty)} has no value on {node}; set it there, or name another folder"
        )
    place = Path(os.path.expandvars(text)).expanduser()
    if not place.is_absolute():
        raise UsageError(f"{SETTING}={text}: must be an absolute path on each node, e.g. {SETTING}=/local/scratch")
    try:
        with told(place):
            place.mkdir(exist_ok=True)
            if not os.access(place, os.W_OK | os.X_OK):
                raise PermissionError(13, os.strerror(13), str(place))
    except DistlmError as error:
        raise DistlmError(
            f"{SETTING}={text}: on {node}, {error}; name a folder that every node has and you may write to, or leave "
            f"{SETTING} out"
        ) from error
    return place.resolve()


def identity(root: Path, node: str) -> tuple[object, ...]:
    """The same on ranks that see one folder on one node: not every cluster's nodes have names of their own, and what is
    started in containers may have disks of its own."""
    found = root.stat()
    started = _BOOT.read_text("ascii") if _BOOT.exists() else ""
    return node, started, str(root), found.st_dev, found.st_ino


@dataclass(frozen=True)
class Place:
    """A node's folder for the copies of one stage of one run."""

    root: Path
    """Where launch.stage_in leads on this node."""
    node: str
    id: str
    """Of the run and what it does."""

    @property
    def folder(self) -> Path:
        """Of the copies."""
        return self.root / f"{self._prefix}{self.id}"

    @property
    def _prefix(self) -> str:
        return f"distlm-{self.node}-"

    def copy_of(self, file: Written) -> Path:
        """Where the copy of a file lies."""
        return self.folder / f"{file.hash}-{file.path.name}"

    def claim(self) -> TextIO:
        """Hold the folder, and remove those of runs on this node that are dead. The lock, to be given to `release`.

        Raises Busy while another process holds it.
        """
        with told(self.root):
            lock = _locked(self._lock, _PATIENCE_S)
            if lock is None:
                raise Busy(
                    f"{self.folder}: in use by the same stage of the same run ({_owner_in(self._lock)}); wait for it, "
                    "or end it"
                )
            lock.truncate(0)
            lock.write(owner())
            lock.flush()
            for other in self.root.glob(f"{self._prefix}*.lock"):
                # One of another user is not ours to remove.
                with contextlib.suppress(OSError):
                    if other != self._lock and (theirs := _locked(other, 0)) is not None:
                        _remove(other, theirs)
            # Other users' jobs may run on the node.
            self.folder.mkdir(0o700, exist_ok=True)
        return lock

    @property
    def _lock(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.lock")

    def release(self, lock: TextIO) -> None:
        """Remove the copies."""
        _remove(self._lock, lock)

    def missing(self, files: Sequence[Written]) -> list[Written]:
        """Those without a whole copy here. What a killed start has left is read and compared; all else is removed."""
        wanted = {self.copy_of(file): file for file in files}
        whole = set()
        with told(self.folder):
            for found in sorted(self.folder.iterdir()):
                if found in wanted and file_hash(found, wanted[found].hash) == wanted[found].hash:
                    whole.add(found)
                    continue
                found.unlink()
        return [file for copy, file in wanted.items() if copy not in whole]

    def require_room(self, needed: int, text: str) -> None:
        """DistlmError when `needed` bytes more do not fit. `text`: the setting."""
        with told(self.root):
            free = shutil.disk_usage(self.root).free
        if free < needed * 1.01:
            raise DistlmError(
                f"{SETTING}={text}: {self.root} on {self.node} has {format_bytes(free)} free, and the copies need "
                f"{format_bytes(needed)}; free some, name a folder with more room, or leave {SETTING} out"
            )


def _remove(lock: Path, held: TextIO) -> None:
    """The folder of a lock that is held, and the lock."""
    with contextlib.suppress(OSError), held:
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink(missing_ok=True)


def _locked(path: Path, patience_s: float) -> TextIO | None:
    """A lock file, locked; None when another still holds it after the patience."""
    deadline = time.monotonic() + patience_s
    while True:
        stream = path.open("a+", encoding="utf-8")
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed it meanwhile: then this is a file without a name.
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return stream
        stream.close()
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.1)


def _owner_in(path: Path) -> str:
    try:
        return path.read_text("utf-8") or "its owner is not known"
    except OSError:
        return "its owner is not known"
