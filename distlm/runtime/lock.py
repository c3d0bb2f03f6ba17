"""Who may write in a folder: one run, or shares of one stage together; the others are told by whom it is held.

Two things hold it: the file system's lock (flock), which goes with its process, and a lease (locks/lease.py), which
also holds where a file system has no locks or each node its own, and which names the owner.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
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
_SHARES_EVERY_S = 0.5
"""How often the locks of shares are looked at, each of which costs a listing of the folder."""
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
            _wait_for_shares(_share_locks(folder))
        else:
            _wait(lock, stream, fcntl.LOCK_SH)
    except _Taken as taken:
        shares = [each for each in taken.others if each.lock != lock] or _running_shares(folder)
        shares = [each for each in shares if share is None or each.lock != _share_lock(folder, share)]
        theirs = next((each.work for each in shares if each.work), "") or taken.work or work
        owners = [f"share {_share_name(each.lock)}: {each.owner}" for each in shares]
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
    try:
        _wait_for_shares([path for path in _share_locks(folder) if not path.name.endswith(f"-of-{share.count}")])
    except _Taken as taken:
        other = _share_name(taken.others[0].lock)
        raise Busy(
            f"{folder}: launch.share={share}, but share {other} is {work} here ({taken.owner}); "
            f"shares that run at once must be of one count; {mend}"
        ) from None


class _Other:
    """Whoever holds a lock now, looked at until it is gone or known to be at work."""

    def __init__(self, lock: Path, kind: int) -> None:
        self.lock, self._kind, self._rival = lock, kind, Rival(lock)
        self._spans, self._began, self._said_at = locks_span_nodes(lock.parent), time.monotonic(), 0.0
        self._held: bool | None = None

    @property
    def owner(self) -> str:
        """For people."""
        return self._about.owner if self._about else _UNKNOWN

    @property
    def work(self) -> str:
        """What it does, for people; empty where that is not known."""
        return self._about.work if self._about else ""

    def look(self, stream: TextIO) -> tuple[bool, int] | None:
        """Try the lock, whose file is open: whether this process now has it on all nodes, and the number of the last
        owner; None: another one has it. An earlier start of this same job that is silent has nothing."""
        self._held = flocked(stream, self._kind)
        self._rival.look()
        locked = self._held is True and self._spans
        # Held by a process that lives, or that a file server has not missed yet.
        silent = self._held is False and self._earlier and self._rival.silent_s > STALE_S
        gone = self._held is not False and self._rival.gone(locked)
        return (locked, self._rival.number) if silent or gone else None

    @property
    def at_work(self) -> bool:
        """At the last look: the file system or a sign of life says so."""
        return self._held is False or self._rival.lives

    @property
    def taken(self) -> bool:
        """It is at work, and has had its time to end."""
        return self.at_work and self._waited > (_EARLIER_START_S if self._earlier else _PATIENCE_S)

    def tell(self) -> None:
        """Once a minute what is waited for."""
        waited = self._waited
        if self._about is not None and (self._earlier or waited > _PATIENCE_S) and waited >= self._said_at:
            self._said_at = waited + 60
            say(f"{self.lock.parent}: {_awaited(self._about, self._earlier)}")

    @property
    def _about(self) -> LockOwner | None:
        return self._rival.record

    @property
    def _waited(self) -> float:
        return time.monotonic() - self._began

    @property
    def _earlier(self) -> bool:
        return _earlier_start(self._about)


class _Taken(Exception):
    """Other processes hold locks."""

    def __init__(self, others: Sequence[_Other]) -> None:
        self.others, self.owner, self.work = others, others[0].owner, others[0].work


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
    other = _Other(lock, kind)
    while (found := other.look(stream)) is None:
        if turn is None and other.taken:
            raise _Taken([other])
        if turn is not None and other.at_work:
            turn()
        other.tell()
        time.sleep(0.1)
    return found


def _wait_for_shares(locks: Sequence[Path]) -> None:
    """Until no process holds one of the shares' locks. Raises _Taken as _wait does.

    All are looked at together: where nothing else tells, each killed one has to be silent for a minute.
    """
    others = [_Other(lock, fcntl.LOCK_SH) for lock in locks]
    while others := [other for other in others if not _looked_free(other)]:
        if taken := [other for other in others if other.taken]:
            raise _Taken(taken)
        others[0].tell()
        time.sleep(_SHARES_EVERY_S)


def _looked_free(share: _Other) -> bool:
    with share.lock.open("a+") as stream:
        return share.look(stream) is not None


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


def _share_locks(folder: Path) -> list[Path]:
    """Lock files of all shares, running or not."""
    return sorted(path for path in folder.glob(f"{_SHARE_LOCKS}*") if "." not in path.name[1:])


def _running_shares(folder: Path) -> list[_Other]:
    """The shares that are known to be at work."""
    shares = [_Other(path, fcntl.LOCK_SH) for path in _share_locks(folder)]
    return [share for share in shares if not _looked_free(share) and share.at_work]


def _share_lock(folder: Path, share: Share) -> Path:
    return folder / f"{_SHARE_LOCKS}{share.index}-of-{share.count}"


def _share_name(path: Path) -> str:
    return path.name.removeprefix(_SHARE_LOCKS).replace("-of-", "/")
