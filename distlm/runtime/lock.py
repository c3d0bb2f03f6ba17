"""Who may write in a folder: advisory locks that the kernel drops when their holder dies, and that name their owner."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from distlm.errors import Busy, DistlmError
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.ranks.share import Share

LOCK = ".lock"
"""Name of the lock file; it stays in the folder."""
_SHARE_LOCKS = ".lock-share-*"
"""One beside it for each share; the next run without a share removes them."""
_PATIENCE_S = 5.0
"""A killed run needs a moment to die."""
_MAY_NOT = (errno.EACCES, errno.EPERM)


@contextmanager
def only_writer(folder: Path, comm: Comm, work: str, share: Share | None = None) -> Iterator[None]:
    """Hold `folder`/.lock on rank 0 for the block: alone, or as a share together with the other shares. Collective.

    `work` says what is done here, for the message that another run gets. Raises Busy on every rank, naming the owner
    (Slurm job, node, process, since when) and its work, while another run holds it after 5 s; a share also when the
    same share runs already, or shares of another count. Raises DistlmError where this user may not write, naming whose
    that is. A file system without locks is taken as it is.
    """
    with ExitStack() as held:
        rank0_first(comm, lambda: _take_or_say_whose(folder, work, share, held))
        yield


def _take_or_say_whose(folder: Path, work: str, share: Share | None, held: ExitStack) -> None:
    try:
        _take(folder, work, share, held)
    except OSError as error:
        if error.errno not in _MAY_NOT:
            raise
        path = _nearest(Path(error.filename or folder))
        raise DistlmError(
            f"{path}: {work} must write here, and you may not ({error.strerror}): it belongs to {_user_of(path)}; "
            "ask them for the right to write there (chmod g+w), or choose another run_dir="
        ) from error


def _nearest(path: Path) -> Path:
    """The path, or the first folder above it that is there."""
    for place in (path, *path.parents):
        try:
            place.stat()
        except OSError:
            continue
        return place
    return path


def _user_of(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:
        # A container knows few names.
        return f"user {path.stat().st_uid}"


def _take(folder: Path, work: str, share: Share | None, held: ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lock = held.enter_context((folder / LOCK).open("a+"))
    mend = "wait for it or end it, or choose another run_dir="
    if not _locked(lock, fcntl.LOCK_EX if share is None else fcntl.LOCK_SH):
        shares = _running_shares(folder)
        theirs = _signature(shares[0] if shares else folder / LOCK)[1] or work
        owners = [f"share {_share_name(path)}: {_owner_in(path)}" for path in shares]
        if len(owners) > 3:
            owners[3:] = [f"and {len(owners) - 3} more shares"]
        raise Busy(f"{folder}: another run is {theirs} here ({'; '.join(owners) or _owner_in(folder / LOCK)}); {mend}")
    if share is None:
        held.enter_context(_signed(lock, work))
        # A running share holds the lock above, so there is none.
        for path in folder.glob(_SHARE_LOCKS):
            path.unlink(missing_ok=True)
        return
    own = folder / _SHARE_LOCKS.replace("*", f"{share.index}-of-{share.count}")
    stream = held.enter_context(own.open("a+"))
    if not _locked(stream, fcntl.LOCK_EX):
        raise Busy(f"{folder}: launch.share={share} is {work} here already ({_owner_in(own)}); {mend}")
    held.enter_context(_signed(stream, work))
    # After taking its own: of two that start together at least one sees the other.
    for path in _running_shares(folder):
        if path != own and not path.name.endswith(f"-of-{share.count}"):
            raise Busy(
                f"{folder}: launch.share={share}, but share {_share_name(path)} is {work} here ({_owner_in(path)}); "
                f"shares that run at once must be of one count; {mend}"
            )


def is_lock(path: Path) -> bool:
    """Whether a file belongs to the locks of its folder."""
    return path.name == LOCK or path.match(_SHARE_LOCKS)


def owner() -> str:
    """This process for the reader of a lock file: Slurm job if any, node, process id and the time."""
    job = os.environ.get("SLURM_JOB_ID")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    process = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    return f"Slurm job {job}, {process}" if job else process


def _locked(stream: TextIO, kind: int, patience_s: float = _PATIENCE_S) -> bool:
    """Take the lock; False when another still holds it after the patience."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        except OSError:
            return True


@contextmanager
def _signed(stream: TextIO, work: str) -> Iterator[None]:
    """Name the owner and its work in a lock file while it is held; only its holder writes there."""
    stream.truncate(0)
    stream.write(f"{owner()}\n{work}")
    stream.flush()
    try:
        yield
    finally:
        # A name that stays does no harm, and what failed in the block is to be told.
        with suppress(OSError):
            stream.truncate(0)


def _owner_in(path: Path) -> str:
    return _signature(path)[0] or "its owner is not known"


def _signature(path: Path) -> tuple[str, str]:
    """Owner and work that a lock file names; empty where it names none."""
    try:
        name, _, work = path.read_text("utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return "", ""
    return name, work


def _running_shares(folder: Path) -> list[Path]:
    """Lock files of shares that are held."""
    running = []
    for path in sorted(folder.glob(_SHARE_LOCKS)):
        with path.open("a+") as stream:
            if not _locked(stream, fcntl.LOCK_SH, patience_s=0):
                running.append(path)
    return running


def _share_name(path: Path) -> str:
    return path.name.removeprefix(_SHARE_LOCKS.rstrip("*")).replace("-of-", "/")
