"""A search list by list (knn.scan=lists) on several ranks against memory-mapped faiss, from the disk and from memory.

An index as large as WikiText-103's with random codes lies in one file. The same queries are searched
  faiss     by faiss.read_index with IO_FLAG_MMAP and its own search, query by query, on --threads threads for each rank
  lists     by what `distlm knn search` does with knn.scan=lists on --ranks ranks: each reads its own lists once
cold (the file is not in the page cache) and warm (all of it was read before). Distances must be the same.

    python benchmarks/list_scan.py [--rows 103225485] [--queries 4096] [--ranks 1 2] [--folder DIR] [--out FILE]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from shared.command import Benchmark, Options, note, report, use_threads
from shared.disk import forget
from shared.index import write_parts

from distlm.config import load_config
from distlm.index.search.searcher import SearchIndex, Shape
from distlm.index.selfcheck import open_mapped
from distlm.knnlm.search.by_lists import SharedLists, batches
from distlm.pipeline import stage_environment
from distlm.runtime.ranks.comm import open_comm
from distlm.runtime.ranks.world import resolve_world

UNIT = 1024
"""Queries of a unit of work."""


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(
        __doc__, rows=20_000, width=16, nlist=16, code_bytes=4, queries=1500, k=10, nprobe=4, repeat=1, ranks=[2],
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=103_225_485)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--nlist", type=int, default=4096)
    parser.add_argument("--code-bytes", type=int, default=16)
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--nprobe", type=int, default=32)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of a rank")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the index lies; default: a temporary")
    parser.add_argument("--way", choices=["faiss", "lists"], help="what a process of this benchmark does")
    parser.add_argument("--index", type=Path, help="of that process")
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    if options.way:
        print(json.dumps(search(options)), flush=True)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        (path,) = write_parts(
            [Path(folder) / "whole.index"], options.rows, options.width, options.nlist, options.code_bytes
        )
        report(measure(options, path), options)


def measure(options: Options, path: Path) -> dict[str, Any]:
    """Queries per second of each way, cold and warm."""
    seconds: dict[str, list[float]] = {}
    sums: dict[str, float] = {}
    peak: dict[str, int] = {}
    for _ in range(options.repeat):
        for ranks in options.ranks:
            for warm in (False, True):
                for way in ("faiss", "lists"):
                    name = f"{way}, {ranks} {'ranks' if way == 'lists' else 'times the threads'}, "
                    name += "warm" if warm else "cold"
                    found = run(options, path, way, ranks, warm)
                    seconds.setdefault(name, []).append(found["seconds"])
                    peak[name] = max(peak.get(name, 0), found["own_MB"])
                    sums[name] = found["sum"]
                    note(f"{name}: {found}")
    assert max(sums.values()) - min(sums.values()) <= 1e-6 * max(sums.values()), sums
    rate = {name: options.queries / statistics.median(of) for name, of in seconds.items()}
    return {
        "rows": options.rows, "bytes": path.stat().st_size, "queries": options.queries, "k": options.k,
        "nprobe": options.nprobe, "seconds": {name: [round(one, 2) for one in of] for name, of in seconds.items()},
        "queries_per_s": {name: round(of, 1) for name, of in rate.items()},
        "lists_over_faiss": {
            name: round(of / rate[name.replace("lists", "faiss").replace("ranks", "times the threads")], 2)
            for name, of in rate.items() if name.startswith("lists")
        },
        "own_MB_of_rank_0": peak,
    }  # fmt: skip


def run(options: Options, path: Path, way: str, ranks: int, warm: bool) -> dict[str, Any]:
    """One search in processes of its own; seconds from the opened index to all results."""
    forget([path])
    with path.open("rb") as stream:
        while warm and stream.read(16 << 20):
            pass
    names = ("rows", "width", "nlist", "queries", "k", "nprobe")
    words = [str(word) for name in names for word in (f"--{name}", getattr(options, name))]
    threads = options.threads * (ranks if way == "faiss" else 1)
    command = [sys.executable, __file__, *words, "--way", way, "--index", str(path), "--threads", str(threads)]
    if way == "lists" and ranks > 1:
        mpirun = [str(Path(sys.executable).parent / "mpirun"), "--oversubscribe", "--bind-to", "none"]
        command = [*mpirun, "-n", str(ranks), *command]
    with stage_environment(load_config("demo", [f"launch.ranks={ranks}"])) as environment:
        environment = {**environment, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"exit {done.returncode}: {' '.join(command)}")
    return next(found for line in done.stdout.splitlines() if (found := json.loads(line)))


def search(options: Options) -> dict[str, float]:
    """In a process of `run`: seconds, and the sum of all distances; empty on ranks but the first."""
    use_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    queries = np.random.default_rng(1).standard_normal((options.queries, options.width), dtype=np.float32)
    if options.way == "faiss":
        index: Any = faiss.read_index(str(options.index), faiss.IO_FLAG_MMAP)
        index.nprobe = options.nprobe
        began = time.perf_counter()
        distances, _ = index.search(queries, options.k)
        return _figures(time.perf_counter() - began, float(distances.sum(dtype=np.float64)))
    comm = open_comm(resolve_world())
    opened = SearchIndex(
        open_mapped(options.index), Shape(options.rows, options.width, options.nlist), options.index, "lists"
    )
    units = [queries[first : first + UNIT] for first in range(0, len(queries), UNIT)]
    shared = SharedLists(comm, opened, options.k, options.nprobe)
    comm.barrier()
    began, total = time.perf_counter(), 0.0
    for batch in batches(range(len(units)), [len(unit) for unit in units], shared.batch):
        mine = [units[number] for number in batch[comm.rank :: comm.size]]
        total += sum(float(distances.sum(dtype=np.float64)) for _, distances in shared.find(mine))
    total = sum(comm.allgather(total))
    seconds = time.perf_counter() - began
    comm.close()
    return _figures(seconds, total) if comm.rank == 0 else {}


def _figures(seconds: float, total: float) -> dict[str, float]:
    status = Path("/proc/self/status").read_text("utf-8").splitlines()
    own = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    return {"seconds": seconds, "sum": total, "own_MB": round(own / 1000)}


if __name__ == "__main__":
    main()
