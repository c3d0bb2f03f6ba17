"""Who may write in a folder: one run, or shares of one stage together; the others are told by whom it is held.

Two things hold it: the file system's lock (flock), which goes with its process, and a lease (locks/lease.py), which
also holds where a file system has no locks or each node its own, and which names the owner.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from distlm.errors import Busy, DistlmError
from distlm.runtime.locks.lease import STALE_S, Rival, claim, locks_span_nodes, new_owner
from distlm.runtime.locks.records import LockOwner
from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.ranks.share import Share

LOCK = ".lock"
"""Name of the lock file; it stays in the folder."""
_SHARE_LOCKS = ".lock-share-"
"""Beginning of one beside it for each share; the next run without a share removes them."""
_PATIENCE_S = 5.0
"""A killed run needs a moment to die."""
_EARLIER_START_S = 600.0
"""So long a start waits for one of its own job that lives on a node which Slurm has lost."""
_UNKNOWN = "its owner is not known"
Turn = Callable[[], None]
"""Called while another process holds a lock; it may raise."""
_MAY_NOT = (errno.EACCES, errno.EPERM)


@contextmanager
def only_writer(folder: Path, comm: Comm, work: str, share: Share | None = None) -> Iterator[None]:
    """Hold `folder`/.lock on rank 0 for the block: alone, or as a share together with the other shares. Collective.

    `work` says what is done here, for the message that another run gets. Raises Busy on every rank, naming the owner
    (Slurm job, node, process, since when) and its work, while another run holds it after 5 s, or after a minute where
    it cannot be told sooner; a share also when the same share runs already, or shares of another count. Raises
    DistlmError where this user may not write, naming whose that is.
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
    lock = folder / LOCK
    stream = held.enter_context(lock.open("a+"))
    mend = "wait for it or end it, or choose another run_dir="
    try:
        if share is None:
            held.enter_context(_owned(lock, stream, work))
            # Where the file system has no locks, a share may be at work all the same.
            for path in _share_locks(folder):
                with path.open("a+") as other:
                    _wait(path, other, fcntl.LOCK_SH)
        else:
            _wait(lock, stream, fcntl.LOCK_SH)
    except _Taken as taken:
        shares = [path for path in _running_shares(folder) if share is None or path != _share_lock(folder, share)]
        theirs = next((about.work for about in map(_owner, shares) if about), "") or taken.work or work
        owners = [f"share {_share_name(path)}: {_owner_in(path)}" for path in shares]
        if len(owners) > 3:
            owners[3:] = [f"and {len(owners) - 3} more shares"]
        raise Busy(f"{folder}: another run is {theirs} here ({'; '.join(owners) or taken.owner}); {mend}") from None
    if share is None:
        # A running share would have been found above, so there is none.
        for path in folder.glob(f"{_SHARE_LOCKS}*"):
            path.unlink(missing_ok=True)
        return
    _take_share(folder, work, share, held, stream, mend)


def _take_share(folder: Path, work: str, share: Share, held: ExitStack, stream: TextIO, mend: str) -> None:
    own = _share_lock(folder, share)
    try:
        held.enter_context(_owned(own, held.enter_context(own.open("a+")), work))
    except _Taken as taken:
        raise Busy(f"{folder}: launch.share={share} is {work} here already ({taken.owner}); {mend}") from None
    # Each takes its own lock first, here and below. So of two that start together at least one sees the other.
    try:
        _wait(folder / LOCK, stream, fcntl.LOCK_SH)
    except _Taken as taken:
        raise Busy(f"{folder}: another run is {taken.work or work} here ({taken.owner}); {mend}") from None
    for path in _running_shares(folder):
        if path != own and not path.name.endswith(f"-of-{share.count}"):
            raise Busy(
                f"{folder}: launch.share={share}, but share {_share_name(path)} is {work} here ({_owner_in(path)}); "
                f"shares that run at once must be of one count; {mend}"
            )


class _Taken(Exception):
    """Another process holds a lock."""

    def __init__(self, about: LockOwner | None) -> None:
        self.owner = about.owner if about else _UNKNOWN
        self.work = about.work if about else ""


@contextmanager
def _owned(lock: Path, stream: TextIO, work: str, turn: Turn | None = None) -> Iterator[None]:
    """Be the owner of a lock, whose file is open, for the block. Raises as _wait does."""
    lease = None
    while lease is None:
        locked, after = _wait(lock, stream, fcntl.LOCK_EX, turn)
        lease = claim(lock, after, new_owner(owner(), work, _job(), _restarts(), locked))
    try:
        yield
    finally:
        lease.release()


def _wait(lock: Path, stream: TextIO, kind: int, turn: Turn | None = None) -> tuple[bool, int]:
    """Until no other process holds a lock: whether this one now does on all nodes, and the number of the last owner.

    Raises _Taken when one does after 5 s; an earlier start of this same Slurm job, which Slurm has given up, is waited
    for until it ends or is silent. With `turn`, which is called again and again, any other is waited for.
    """
    rival, began, said_at, spans = Rival(lock), time.monotonic(), 0.0, locks_span_nodes(lock.parent)
    while True:
        held = flocked(stream, kind)
        rival.look()
        earlier = _earlier_start(rival.record)
        waited = time.monotonic() - began
        if held is False:
            # By a process that lives, or that a file server has not missed yet.
            if earlier and rival.silent_s > STALE_S:
                return False, rival.number
            taken = waited > (_EARLIER_START_S if earlier else _PATIENCE_S)
        elif rival.gone(held is True and spans):
            return held is True and spans, rival.number
        else:
            taken = rival.lives and waited > (_EARLIER_START_S if earlier else _PATIENCE_S)
        if taken and turn is None:
            raise _Taken(rival.record)
        if turn is not None and (held is False or rival.lives):
            turn()
        if rival.record is not None and (earlier or waited > _PATIENCE_S) and waited >= said_at:
            said_at = waited + 60
            say(f"{lock.parent}: {_awaited(rival.record, earlier)}")
        time.sleep(0.1)


def _awaited(about: LockOwner, earlier: bool) -> str:
    who = f"{about.owner} was {about.work} here and gives no sign of life"
    if earlier:
        who = f"start {about.restarts + 1} of this same job is {about.work} here ({about.owner})"
    return f"{who}; waiting until it ends or has been silent for {STALE_S:g} s"


def _earlier_start(about: LockOwner | None) -> bool:
    """Whether an owner is a start of this Slurm job before it was requeued: that one never comes back."""
    return about is not None and about.job != "" and about.job == _job() and about.restarts < _restarts()


@contextmanager
def in_turn(lock: Path, work: str, turn: Turn) -> Iterator[None]:
    """Be the owner of a lock for the block, after those that hold it now. `work`: what is done, for messages.

    `turn` is called again and again while another one holds it, and may raise.
    """
    with lock.open("a+") as stream, _owned(lock, stream, work, turn):
        yield


def is_lock(path: Path) -> bool:
    """Whether a file belongs to the locks of its folder."""
    return path.name == LOCK or path.name.startswith((f"{LOCK}.", _SHARE_LOCKS))


def owner() -> str:
    """This process for whoever finds its lock: Slurm job if any, node, process id and the time."""
    process = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    return f"Slurm job {_job()}, {process}" if _job() else process


def _job() -> str:
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return os.environ.get("SLURM_JOB_ID", "")


def _restarts() -> int:
    text = os.environ.get("SLURM_RESTART_COUNT", "0")
    return int(text) if text.isdigit() else 0


def flocked(stream: TextIO, kind: int) -> bool | None:
    """Take the file system's lock; False: another one holds it, None: there are none here."""
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _owner(lock: Path) -> LockOwner | None:
    rival = Rival(lock)
    rival.look()
    return rival.record


def _owner_in(lock: Path) -> str:
    about = _owner(lock)
    return about.owner if about else _UNKNOWN


def _share_locks(folder: Path) -> list[Path]:
    """Lock files of all shares, running or not."""
    return sorted(path for path in folder.glob(f"{_SHARE_LOCKS}*") if "." not in path.name[1:])


def _running_shares(folder: Path) -> list[Path]:
    """Lock files of shares that are held."""
    running, spans = [], locks_span_nodes(folder)
    for path in _share_locks(folder):
        with path.open("a+") as stream:
            held, rival = flocked(stream, fcntl.LOCK_SH), Rival(path)
            rival.look()
            if held is False or not rival.gone(held is True and spans):
                running.append(path)
    return running


def _share_lock(folder: Path, share: Share) -> Path:
    return folder / f"{_SHARE_LOCKS}{share.index}-of-{share.count}"


def _share_name(path: Path) -> str:
    return path.name.removeprefix(_SHARE_LOCKS).replace("-of-", "/")
