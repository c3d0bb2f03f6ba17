"""What hundreds of ranks ask of the file system of a run, and how soon they notice that one is gone; on one machine.

    python benchmarks/ranks.py [--ranks 64 256 1024] [--per-node 8] [--units 4] [--lost-after 10] [--seconds 10]
                               [--folder FOLDER] [--out FILE]

Each rank is a thread of one process, the files are real, in FOLDER (default: a temporary one), and the code is that of
the stages: the watch over the ranks (runtime/alive.py), the lock of a folder, and units written atomically into one
folder, --units of each rank in rounds. The work is none, and the collectives are a list in memory: what is measured is
what ranks and file system have to do with each other. After the rounds all ranks wait --seconds, then the last one
falls silent, as of a node that is down (launch.lost_after_s=--lost-after), and the others end.

Of each part: seconds; operations on files and folders by all ranks, and by the busiest one (open, stat, rename, remove,
make, list), and entries of folders that were listed; and how many times as many operations the most ranks make as the
fewest, over how many times as many ranks they are: above 1 something grows faster than the ranks.

Threads of one process take turns, so the seconds are upper bounds of what ranks of their own would wait for each other,
and lower bounds of what a file system over a network takes for the operations.
"""

import builtins
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.command import Benchmark, Options, note, report

from distlm.runtime import alive, files
from distlm.runtime.files import write_json
from distlm.runtime.lock import only_writer
from distlm.runtime.ranks.world import World

PARTS = ("start", "signs of life", "rounds", "loss")
_EVENTS = {"open": "open", "os.rename": "rename", "os.remove": "remove", "os.mkdir": "make", "os.rmdir": "remove"}


class Operations:
    """Counts what the threads do with files of the folder; one for the process, as hooks stay."""

    def __init__(self) -> None:
        self.root, self.part = "\0", ""
        self.of_rank: dict[tuple[str, int], Counter[str]] = {}
        sys.addaudithook(self._event)
        self._stat, self._listdir, self._scandir = os.stat, os.listdir, os.scandir

    def add(self, what: str, count: int = 1) -> None:
        rank = getattr(threading.current_thread(), "rank", None)
        if rank is not None:
            self.of_rank.setdefault((self.part, rank), Counter())[what] += count

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and arguments and str(arguments[0]).startswith(self.root):
            self.add(_EVENTS[event])

    @contextmanager
    def counted(self, root: Path) -> Any:
        """Of the files below `root`."""
        self.root = str(root)
        os.stat, os.listdir, os.scandir = self._of_stat, self._of_listdir, self._of_scandir
        try:
            yield
        finally:
            os.stat, os.listdir, os.scandir = self._stat, self._listdir, self._scandir
            self.root = "\0"

    def _of_stat(self, path: Any, *given: Any, **named: Any) -> Any:
        if str(path).startswith(self.root):
            self.add("stat")
        return self._stat(path, *given, **named)

    def _of_listdir(self, path: Any = ".") -> Any:
        found = self._listdir(path)
        if str(path).startswith(self.root):
            self.add("list")
            self.add("entries", len(found))
        return found

    def _of_scandir(self, path: Any = ".") -> Any:
        if str(path).startswith(self.root):
            self.add("list")
            self.add("entries", len(self._listdir(path)))
        return self._scandir(path)

    def take(self) -> dict[str, dict[str, int]]:
        """Part → operations of all ranks and of the busiest, and entries listed; and forget them."""
        found: dict[str, dict[str, int]] = {}
        for part in PARTS:
            counts = [counter for (of, _), counter in [*self.of_rank.items()] if of == part]
            made = [counter.total() - counter["entries"] for counter in counts] or [0]
            found[part] = {
                "operations": sum(made), "of_busiest": max(made), "entries": sum(each["entries"] for each in counts)
            }  # fmt: skip
        self.of_rank.clear()
        return found


class Together:
    """Collectives of threads."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def gathered(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = [*self.values]
        self.barrier.wait()
        return found


class ThreadComm:
    """One rank's end."""

    def __init__(self, rank: int, size: int, group: Together) -> None:
        self.rank, self.size, self._group = rank, size, group

    def barrier(self) -> None:
        self._group.barrier.wait()

    def bcast(self, value: Any) -> Any:
        return self._group.gathered(self.rank, value)[0]

    def allgather(self, value: Any) -> list[Any]:
        return self._group.gathered(self.rank, value)

    def gather(self, value: Any) -> list[Any] | None:
        found = self._group.gathered(self.rank, value)
        return None if self.rank else found

    def alltoall(self, values: list[Any]) -> list[Any]:
        return [of[self.rank] for of in self._group.gathered(self.rank, values)]

    def sum(self, array: Any) -> None:
        array[...] = sum(self._group.gathered(self.rank, array.copy()))

    def any(self, flag: bool) -> bool:
        return any(self._group.gathered(self.rank, flag))

    def close(self) -> None:
        return None


class Watched(alive.Watch):
    """A rank that notes when it would have ended, and whose watch counts for its rank."""

    noticed_at = 0.0

    def start(self) -> None:
        self._thread.rank = self.world.rank  # type: ignore[attr-defined]
        super().start()
        threading.current_thread().watch = self  # type: ignore[attr-defined]

    def _end(self, news: str) -> None:
        self.noticed_at = time.monotonic()
        self._ended.set()


class EachItsOwn(dict[Any, Any]):
    """A table of the process of which each thread has its own entries, as each rank has a process."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__((threading.get_ident(), key))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__((threading.get_ident(), key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__((threading.get_ident(), key), value)


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(__doc__, ranks=[4, 8], units=2, lost_after=1.0, seconds=1.0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--per-node", type=int, default=8, help="ranks of a node")
    parser.add_argument("--units", type=int, default=4, help="units of a rank")
    parser.add_argument("--lost-after", type=float, default=10.0, help="launch.lost_after_s")
    parser.add_argument("--seconds", type=float, default=10.0, help="time in which only the signs of life are counted")
    parser.add_argument("--folder", type=Path, help="where the files are made, a folder on the file system in question")
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    threading.stack_size(256 << 10)
    alive.Watch = Watched  # type: ignore[misc]
    files._seen = EachItsOwn()
    operations = Operations()
    found: dict[str, Any] = {}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found[str(ranks)] = simulate(Path(folder), ranks, operations, options)
        note(f"{ranks} ranks: {found[str(ranks)]}")
    report({"ranks": found, "growth": growth(found)}, options)


def growth(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Part → operations and entries of the most ranks over those of the fewest, over the ratio of the ranks."""
    few, many = min(found, key=int), max(found, key=int)
    ratio = int(many) / int(few)
    return {
        part: {
            what: round(found[many][part][what] / max(1, found[few][part][what]) / ratio, 2)
            for what in ("operations", "entries")
        }
        for part in PARTS
    }


def simulate(folder: Path, ranks: int, operations: Operations, options: Options) -> dict[str, Any]:
    """One start, from the watch's first sign to the last rank's end."""
    group, clocks = Together(ranks), dict[str, float]()
    watches: list[Watched] = []

    def mark(rank: int, part: str) -> None:
        """All ranks go on to the next part."""
        group.barrier.wait()
        if rank == 0:
            clocks[part] = time.monotonic()
            operations.part = part
        group.barrier.wait()

    def rank(number: int) -> None:
        comm = ThreadComm(number, ranks, group)
        world = World(
            number, ranks, number % options.per_node, options.per_node, f"node-{number // options.per_node}", "slurm"
        )
        mark(number, "start")
        with alive.watching(folder, world, comm, options.lost_after):
            watches.append(threading.current_thread().watch)  # type: ignore[attr-defined]
            with only_writer(folder / "units", comm, "writing units"):
                mark(number, "signs of life")
                time.sleep(options.seconds)
                mark(number, "rounds")
                for unit in range(number, ranks * options.units, ranks):
                    write_json(folder / "units" / f"unit-{unit:05d}.json", {"unit": unit})
                    comm.any(False)
                mark(number, "loss")
                own = threading.current_thread().watch  # type: ignore[attr-defined]
                if number == ranks - 1:
                    own._ended.set()
                own._ended.wait(10 * options.lost_after)
                group.barrier.wait()
        mark(number, "end")

    with operations.counted(folder):
        threads = [_thread(rank, number) for number in range(ranks)]
        for thread in threads:
            thread.join()
    ended = time.monotonic()
    found: dict[str, Any] = dict(operations.take())
    times = [*clocks.values()]
    for part, begin, end in zip(PARTS, times, times[1:], strict=False):
        found[part]["seconds"] = round(end - begin, 2)
        found[part]["operations_per_s"] = round(found[part]["operations"] / (end - begin), 1)
    noticed = sorted(each.noticed_at - clocks["loss"] for each in watches if each.noticed_at)
    if len(noticed) != ranks - 1:
        sys.exit(f"{ranks - 1 - len(noticed)} of {ranks - 1} ranks did not notice the loss")
    found["noticed_s"] = {"first": round(noticed[0], 2), "last": round(noticed[-1], 2)}
    found["ended_s"] = round(ended - clocks["end"], 2)
    return found


def _thread(work: Callable[[int], None], rank: int) -> threading.Thread:
    def run() -> None:
        try:
            work(rank)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            builtins.print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)

    made = threading.Thread(target=run, daemon=True)
    made.rank = rank  # type: ignore[attr-defined]
    made.start()
    return made


if __name__ == "__main__":
    main()
