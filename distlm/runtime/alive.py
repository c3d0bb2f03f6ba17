"""Signs of life: when a rank or its node dies, the others end within a stated time and say which it was.

A killed rank leaves its peers in a collective, and where a node vanishes the sockets never close: without this they
wait for the timeout of the collective (half an hour). Every rank has a thread that writes a count into a file of its
own; ranks look after the processes of their own node, rank 0 after the files of all, and all after rank 0's. Files, and
not sockets, because the run directory is what all launchers share, and because its being shared is then checked too.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from distlm.errors import EXIT_ERROR, EXIT_STOPPED, DistlmError
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.ranks.network import network_error, of_network
from distlm.runtime.ranks.said import ENDS_TOO
from distlm.runtime.ranks.world import World
from distlm.runtime.records import RankAlive, RankLost, Record

FOLDER = ".alive"
"""Under the run directory: one folder per running stage."""
STARTER = "DISTLM_STARTER"
"""Environment variable of what `distlm run` starts: its process and when that started. Not every launcher ends its
ranks when it is ended itself, and a run that is killed must leave none behind."""
VISIBLE_AFTER_S = 20.0
"""A network file system may show another node's new file this late."""
_LOST = "lost.json"
_DAY = 86400


class Watch:
    """One rank's end of the watch; use `watching`."""

    running: ClassVar["Watch | None"] = None
    """That of this process."""

    def __init__(self, folder: Path, world: World, lost_after_s: float) -> None:
        self.folder, self.world, self.lost_after_s = folder, world, lost_after_s
        self.every_s = min(5.0, max(lost_after_s / 6, 0.05))
        self.exit_code = EXIT_STOPPED
        """How the ranks end that are left over: after a kill the same command goes on where it was."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distlm-alive", daemon=True)
        self._beats = 0
        self._leftovers = _Leftovers(folder)
        self._peers: dict[int, RankAlive] = {}
        self._changed: dict[int, tuple[int, float]] = {}
        self._starter = os.environ.get(STARTER, "")
        if not _lives(self._starter):
            # Not to be seen from here (a container).
            self._starter = ""

    def beat(self, ended: bool = False) -> None:
        """Write this rank's file: closed each time, which is when a network file system shows it to others."""
        self._beats += 1
        about = RankAlive(
            rank=self.world.rank, node=self.world.node, pid=os.getpid(), started=process_start(os.getpid()),
            beat=self._beats, ended=ended,
        )  # fmt: skip
        _write(self._file(self.world.rank), about)

    def wait_for_files(self, ranks: list[int]) -> list[int]:
        """Wait until the files of `ranks` can be read here; returns those that cannot within VISIBLE_AFTER_S."""
        deadline = time.monotonic() + VISIBLE_AFTER_S
        while True:
            missing = [rank for rank in ranks if rank not in self._peers]
            self._peers |= {rank: about for rank in missing if (about := self._read(rank)) is not None}
            missing = [rank for rank in missing if rank not in self._peers]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.05)

    def start(self) -> None:
        """Begin to watch."""
        # Where processes of one node cannot see each other (a container each), only the beats tell.
        self._local = {
            rank: about for rank, about in self._peers.items()
            if about.node == self.world.node and about.started and process_start(about.pid) == about.started
        }  # fmt: skip
        self._thread.start()
        Watch.running = self

    def stop(self) -> None:
        """This rank is done; its silence means nothing from now on."""
        Watch.running = None
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self.beat(ended=True)

    def wait_for_ends(self) -> None:
        """Until the peers have written their last word, at most 2 s, so that none writes into a removed folder."""
        deadline, left = time.monotonic() + 2.0, [*self._peers]
        while time.monotonic() < deadline:
            left = [rank for rank in left if (about := self._read(rank)) is None or not about.ended]
            if not left:
                return
            time.sleep(0.01)

    def leave(self, error: BaseException) -> None:
        """This rank ends by an error of its own: the others end too, and name it."""
        lost = of_network(error)
        if lost:
            # Some other rank is: give the watch its time to say which, and to end this rank.
            self._thread.join(self.lost_after_s + 3 * self.every_s)
        self._ended.set()
        first = (str(error).strip().splitlines() or [""])[0]
        # Run again, it would end so again, unless it was the network.
        self.exit_code = EXIT_STOPPED if lost else EXIT_ERROR
        self._tell(self.world.rank, self.world.node, f"it ended with {type(error).__name__}: {first}")

    def _run(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self.every_s):
            now = time.monotonic()
            if now - before > self.every_s + self.lost_after_s / 2:
                # This process itself did not run (suspended job, swapped machine): the others' silence says nothing.
                self._changed.clear()
            before = now
            # A hiccup of the file system is no death; a lasting one shows as silence.
            with contextlib.suppress(OSError):
                self.beat()
            if self.world.rank == 0:
                with contextlib.suppress(OSError):
                    self._leftovers.look(now, max(self.lost_after_s, 60.0))
            news = self._news(now)
            if news is not None and not self._ended.is_set():
                self._end(news)

    def _news(self, now: float) -> str | None:
        """What is known of a rank that is gone."""
        if (lost := RankLost.peek(self.folder / _LOST)) is not None:
            self.exit_code = lost.exit_code
            return lost.text
        if self._starter and not _lives(self._starter):
            return f"process {self._starter.split()[0]}, which started this, is gone (killed?)"
        for rank, about in self._peers.items():
            if rank in self._local and process_start(about.pid) != about.started:
                latest = self._read(rank)
                # It may have ended in order, and rank 0 may have removed the folder.
                if latest is not None and not latest.ended:
                    return self._tell(rank, about.node, f"its process {about.pid} is gone (killed?)")
            if (self.world.rank == 0 or rank == 0) and (latest := self._read(rank)) is not None:
                count, since = self._changed.get(rank, (-1, now))
                self._changed[rank] = (latest.beat, since if count == latest.beat else now)
                if now - self._changed[rank][1] > self.lost_after_s and not latest.ended:
                    return self._tell(rank, about.node, f"no sign of life for {self.lost_after_s:g} s (node down?)")
        return None

    def _tell(self, rank: int, node: str, reason: str) -> str:
        text = f"rank {rank} on {node} is lost: {reason}"
        with contextlib.suppress(OSError):
            if not (self.folder / _LOST).exists():
                _write(self.folder / _LOST, RankLost(rank=rank, text=text, exit_code=self.exit_code))
        return text

    def _end(self, news: str) -> None:
        print(
            f"[rank {self.world.rank} on {self.world.node}] distlm: {news}{ENDS_TOO} Complete work is kept: "
            "run the same command again to continue",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        # The main thread may be inside a collective that never returns, so nothing orderly is possible.
        os._exit(self.exit_code)

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _read(self, rank: int) -> RankAlive | None:
        return RankAlive.peek(self._file(rank))


@contextlib.contextmanager
def watching(root: Path, world: World, comm: Comm, lost_after_s: float) -> Iterator[None]:
    """Check that all nodes see the same `root`, then watch over the ranks for the block (0: check only). Collective.

    Raises DistlmError on every rank when a node does not see what rank 0 wrote into the run directory.
    """
    if comm.size == 1:
        yield
        return
    token, master = comm.bcast((uuid.uuid4().hex[:12], world.node))
    watch = Watch(root / FOLDER / token, world, lost_after_s)
    rank0_first(comm, lambda: watch.folder.mkdir(parents=True))
    try:
        _check_shared(watch, root, comm, master)
    except BaseException:
        _remove(watch)
        raise
    if lost_after_s <= 0:
        # All have seen it, and nobody looks again.
        _remove(watch)
        yield
        return
    watch.start()
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, DistlmError) and error.shared):
            watch.leave(error)
        if of_network(error) and not isinstance(error, DistlmError):
            raise network_error(error, f"{world} lost the other ranks") from error
        raise
    finally:
        watch.stop()
        if world.rank == 0 and RankLost.peek(watch.folder / _LOST) is None:
            watch.wait_for_ends()
            _remove(watch)


def _remove(watch: Watch) -> None:
    """On rank 0: the folder of this start, and that of all starts where it was the last."""
    if watch.world.rank == 0:
        shutil.rmtree(watch.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            watch.folder.parent.rmdir()


class _Leftovers:
    """Folders of earlier starts that were killed. What is old is told by the file system's own stamps and by counts
    that stand still: clocks of nodes and of the file system may be days apart."""

    def __init__(self, own: Path) -> None:
        self._own, self._counts, self._since = own, dict[Path, str](), 0.0

    def look(self, now: float, silent_s: float) -> None:
        """Remove those that are a day older than this start and have not changed in `silent_s` since the first look."""
        if not self._since:
            self._since, self._counts = now, {folder: self._signs(folder) for folder in self._old()}
        elif now - self._since > silent_s:
            for folder in [each for each, signs in self._counts.items() if self._signs(each) == signs]:
                shutil.rmtree(folder, ignore_errors=True)
            self._counts = {}

    def _old(self) -> list[Path]:
        began = self._own.stat().st_mtime
        return [each for each in self._own.parent.iterdir() if began - each.stat().st_mtime > _DAY]

    @staticmethod
    def _signs(folder: Path) -> str:
        return "".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("rank-*.json")))


def _check_shared(watch: Watch, root: Path, comm: Comm, master: str) -> None:
    """Collective. Only rank 0 made the folder: a node that has its own file system does not see it."""
    deadline = time.monotonic() + VISIBLE_AFTER_S
    while not watch.folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    sees = watch.folder.exists()
    if sees:
        watch.beat()
    places = comm.allgather((watch.world.node, sees))
    if blind := sorted({node for node, there in places if not there}):
        failure = DistlmError(
            f"run_dir={root}: not shared, {', '.join(blind)} cannot see what rank 0 wrote there on {master}; put "
            "run_dir= on a file system that all nodes mount"
        )
        failure.shared = True
        raise failure
    local = {rank for rank, (node, _) in enumerate(places) if node == watch.world.node}
    wanted = set(range(comm.size)) if comm.rank == 0 else {0} | local
    missing = watch.wait_for_files(sorted(wanted - {comm.rank}))

    def refuse() -> None:
        if missing:
            raise DistlmError(f"run_dir={root}: {watch.world.node} does not see files that ranks {missing} wrote there")

    together(comm, refuse)


def end_start(text: str, code: int) -> None:
    """End this process at once, and with it its start: the other ranks say `text` and end with `code`, too."""
    if (watch := Watch.running) is not None:
        watch.exit_code = code
        with contextlib.suppress(OSError):
            if not (watch.folder / _LOST).exists():
                _write(watch.folder / _LOST, RankLost(rank=watch.world.rank, text=text, exit_code=code))
    print(f"distlm: {text}", file=sys.stderr, flush=True)
    os._exit(code)


def process_start(pid: int) -> str:
    """When a process of this node started, in the kernel's ticks; empty when it does not run (a zombie has ended)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def this_process() -> str:
    """Value of the variable STARTER for processes that this one starts."""
    return f"{os.getpid()} {process_start(os.getpid())}"


def _lives(starter: str) -> bool:
    pid, _, started = starter.partition(" ")
    return bool(started) and process_start(int(pid)) == started


def _write(path: Path, record: Record) -> None:
    # Not flushed to the disk, as Record.write does: it is a sign to others, not to be kept.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(record.line(), "utf-8")
    temporary.replace(path)
