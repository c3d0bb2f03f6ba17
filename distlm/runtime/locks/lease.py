"""A lease on a folder: a file that its owner keeps rewriting, for file systems whose locks are missing or a node's own.

Owners are numbered: whoever creates `.lock.N+1` with O_EXCL has followed the owner of `.lock.N`, and of all that try
one succeeds. The number only rises, so that an owner that was taken for dead, a stopped process say, finds another's
file when it goes on, and ends. No clock is compared with another's: silence is a count that stands still for a minute
of the one who waits.
"""

import errno
import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from distlm.errors import EXIT_ERROR
from distlm.runtime.alive import end_start, process_start
from distlm.runtime.locks.records import LockOwner
from distlm.runtime.records import replaced

RENEW_S = 2.0
"""How often an owner rewrites its file."""
STALE_S = 60.0
"""An owner that is silent so long is dead, where nothing says so earlier. More than any call that keeps the thread
below from running."""
_GONE = (errno.ENOENT, errno.ESTALE)


class Lease:
    """One owner's end."""

    def __init__(self, lock: Path, number: int, record: LockOwner) -> None:
        """Of the file `lock`.`number`, which `claim` has made."""
        self.path, self._record, self._number = lock.with_name(f"{lock.name}.{number}"), record, number
        self._next = lock.with_name(f"{lock.name}.{number + 1}")
        # A folder that was moved away (`distlm clean`) is nobody else's.
        self._folder = lock.parent.stat().st_ino
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distlm-lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder back. What was another's by then is no end in order."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            if not self._ours():
                if self._same_folder():
                    self._fenced()
            elif self._record.locked:
                # The next owner looks at it while it holds the file system's lock.
                self.path.unlink()
            else:
                self._write(ended=True)

    def _run(self) -> None:
        while not self._ended.wait(RENEW_S):
            # A hiccup of the file system is no other owner.
            with suppress(OSError):
                if not self._ours():
                    if self._same_folder():
                        self._fenced()
                    return
                self._write()

    def _ours(self) -> bool:
        """Whether the file is there and this owner's, and no later one's is. Raises OSError when it cannot be read."""
        try:
            text = self.path.read_text("utf-8")
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        return self._record.name in text and not self._next.exists()

    def _same_folder(self) -> bool:
        try:
            return self.path.parent.stat().st_ino == self._folder
        except OSError:
            return False

    def _write(self, ended: bool = False) -> None:
        self._record = replaced(self._record, beat=self._record.beat + 1, ended=ended)
        # In place and closed each time: that is when a network file system shows it to others.
        with self.path.open("r+", encoding="utf-8") as stream:
            stream.write(self._record.line())
            # After it: where it cannot be written this owner's name stays.
            stream.truncate()

    def _fenced(self) -> None:
        other = LockOwner.peek(self._next)
        who = f" ({other.owner})" if other is not None else ""
        end_start(
            f"{self.path.parent}: another run is at work here{who}; this one had not been heard of for {STALE_S:g} s "
            "(stopped, or cut off), so it ends and leaves the folder to that one",
            EXIT_ERROR,
        )


def new_owner(owner: str, work: str, job: str, restarts: int, locked: bool) -> LockOwner:
    """The record of this process."""
    pid = os.getpid()
    return LockOwner(
        name=uuid.uuid4().hex, owner=owner, work=work, job=job, restarts=restarts, place=place(), pid=pid,
        started=process_start(pid), locked=locked, beat=0, ended=False,
    )  # fmt: skip


def claim(lock: Path, after: int, record: LockOwner) -> Lease | None:
    """Become the owner that follows number `after`; None when another one has."""
    path = lock.with_name(f"{lock.name}.{after + 1}")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(record.line())
    except OSError:
        # Nobody's: the next one would wait for it.
        path.unlink(missing_ok=True)
        raise
    numbers = numbers_of(lock)
    if numbers and numbers[-1] > after + 1:
        # The lease that was looked at is long gone.
        path.unlink(missing_ok=True)
        return None
    for number in numbers:
        if number <= after:
            lock.with_name(f"{lock.name}.{number}").unlink(missing_ok=True)
    return Lease(lock, after + 1, record)


def numbers_of(lock: Path) -> list[int]:
    """Numbers of the owners of a lock whose files are there, rising."""
    begin = f"{lock.name}."
    names = (path.name.removeprefix(begin) for path in lock.parent.glob(f"{begin}*"))
    return sorted(int(name) for name in names if name.isdigit())


class Rival:
    """The present owner of a lock as this process sees it, looked at again and again."""

    def __init__(self, lock: Path) -> None:
        self._lock = lock
        self._text, self._since, self._changed = "", time.monotonic(), False
        self.number, self.record = 0, None  # type: tuple[int, LockOwner | None]

    def look(self) -> None:
        """Once more."""
        numbers = numbers_of(self._lock)
        number = numbers[-1] if numbers else 0
        path = self._lock.with_name(f"{self._lock.name}.{number}")
        try:
            text = path.read_text("utf-8") if number else ""
        except (OSError, UnicodeDecodeError):
            text = ""
        if (number, text) != (self.number, self._text):
            # Another owner than before is not yet known to live.
            self._changed = number == self.number and self._text != ""
            self._since = time.monotonic()
        record = LockOwner.peek(path) if text else None
        # While a lease is being rewritten it still belongs to the owner it had.
        self.record = self.record if record is None and number == self.number else record
        self.number, self._text = number, text

    @property
    def silent_s(self) -> float:
        """Seconds in which nothing changed."""
        return time.monotonic() - self._since

    def gone(self, locked: bool) -> bool:
        """Whether there is no owner, or a dead one. `locked`: this process holds the lock on all nodes."""
        if self.number == 0:
            return True
        if self.record is not None:
            if self.record.ended or (locked and self.record.locked):
                return True
            if self.record.place == place() and self.record.started:
                return process_start(self.record.pid) != self.record.started
        return self.silent_s > STALE_S

    @property
    def lives(self) -> bool:
        """It is known to be at work: its process is seen, or its file has changed."""
        seen = self.record is not None and self.record.place == place() and not self.gone(False)
        return seen or self._changed


def place() -> str:
    """Where this process can be seen by its number; empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


_OWN = ("beegfs", "fuse", "9p", "virtiofs", "afs", "cifs", "smb3", "orangefs", "pvfs2")
"""File systems whose locks are, or may be, each node's own."""


def locks_span_nodes(folder: Path) -> bool:
    """Whether flock on the file system of `folder` holds on all nodes that mount it, as far as its mount says."""
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return True
    return span_nodes(folder.resolve(), lines)


def span_nodes(folder: Path, mountinfo: list[str]) -> bool:
    """The same of the lines of /proc/self/mountinfo."""
    kind, options, longest = "", "", -1
    for line in mountinfo:
        head, _, tail = line.partition(" - ")
        mount = Path(head.split()[4].encode().decode("unicode_escape"))
        # Where two are mounted on one place, the later one hides the other.
        if folder.is_relative_to(mount) and len(str(mount)) >= longest:
            words = tail.split()
            kind, options, longest = words[0], f"{head.split()[5]},{words[-1]}", len(str(mount))
    found = options.split(",")
    if kind == "lustre":
        return "flock" in found
    if kind.startswith("nfs"):
        return not {"nolock", "local_lock=all", "local_lock=flock"} & set(found)
    return not kind.startswith(_OWN)
