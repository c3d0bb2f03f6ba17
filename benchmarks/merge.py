"""Merging parts as large as the index of WikiText-103 (103 M keys, IVF4096,PQ64: 7.5 GB) against copying them.

Parts of one trained index with random codes are written by faiss; then, in turns,
  copy      the same bytes from all parts into one file, then fsync: what the disk can do
  merge     `distlm index merge --parts` on --ranks ranks, with the memory of every rank
and at the end faiss opens the result memory-mapped and counts its keys. Before each of them the parts are dropped from
the page cache, and what was written before is on the disk: both read and write as if nothing had gone before. A disk
has moods: each merge is compared with the copies before and after it, and the median of the turns is what counts.

    python benchmarks/merge.py [--rows 103225485] [--parts 8] [--ranks 1 2] [--repeat 5] [--folder DIR] [--out FILE]

Peak memory is the largest resident set seen in a rank, looked at every 20 ms; pages of files that faiss maps count.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import psutil
from shared.command import Benchmark, Options, note, report
from shared.disk import forget
from shared.index import write_parts

from distlm.config import load_config
from distlm.pipeline import stage_environment

CODE_BYTES = 64
COPY_BYTES = 16 << 20


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(__doc__, rows=20_000, width=64, nlist=16, parts=3, ranks=[2], repeat=1)
    parser.add_argument("--rows", type=int, default=103_225_485)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--nlist", type=int, default=4096)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where parts and merged files lie; default: a temporary")
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report(measure(options, Path(folder)), options)


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Seconds of each way in every turn, and what they say."""
    paths = [folder / f"part_{number}.index" for number in range(options.parts)]
    parts = write_parts(paths, options.rows, options.width, options.nlist, CODE_BYTES)
    total = sum(part.stat().st_size for part in parts)
    copies = [copy(parts, folder / "copy")]
    seconds: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    peak: dict[str, int] = {}
    for _ in range(options.repeat):
        for ranks in options.ranks:
            name = f"merge, {ranks} ranks"
            took, largest = merge(parts, folder / "merged.index", ranks)
            seconds.setdefault(name, []).append(took)
            peak[name] = max(peak.get(name, 0), largest)
            opened = faiss.read_index(str(folder / "merged.index"), faiss.IO_FLAG_MMAP)
            assert opened.ntotal == options.rows
            del opened
            for path in folder.glob("merged.index*"):
                path.unlink()
            copies.append(copy(parts, folder / "copy"))
            ratios.setdefault(name, []).append((copies[-2] + copies[-1]) / 2 / took)
            note(f"{name}: {took:.1f} s, copies around it {copies[-2]:.1f} and {copies[-1]:.1f} s")
    seconds = {"copy": copies, **seconds}
    return {
        "rows": options.rows, "bytes": total, "parts": len(parts),
        "seconds": {name: [round(value, 1) for value in times] for name, times in seconds.items()},
        "MB_per_s": {name: round(total / statistics.median(times) / 1e6) for name, times in seconds.items()},
        "rate_over_copies_around": {
            name: {"median": round(statistics.median(of), 2), "turns": [round(value, 2) for value in of]}
            for name, of in ratios.items()
        },
        "peak_MB_per_rank": {name: round(value / 1e6) for name, value in peak.items()},
    }  # fmt: skip


def copy(parts: list[Path], out: Path) -> float:
    """Seconds of writing all parts one after another into one file, until they are on the disk."""
    forget(parts)
    began = time.perf_counter()
    with out.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target, COPY_BYTES)
        os.fsync(target.fileno())
    took = time.perf_counter() - began
    out.unlink()
    return took


def merge(parts: list[Path], out: Path, ranks: int) -> tuple[float, int]:
    """Seconds of the command from its start to its end, and the largest resident set of a rank in bytes."""
    program = [sys.executable, "-m", "distlm", "index", "merge", "--parts", *map(str, parts), "--out", str(out)]
    launcher = [str(Path(sys.executable).parent / "mpirun"), "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    command = program if ranks == 1 else [*launcher, *program]
    with stage_environment(load_config("demo", [f"launch.ranks={ranks}"])) as environment:
        forget(parts)
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
        largest = 0
        while process.poll() is None:
            for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    if "-m" in child.cmdline()[1:3]:
                        largest = max(largest, child.memory_info().rss)
                except (psutil.Error, IndexError):
                    continue
            time.sleep(0.02)
        took = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"exit {process.returncode}: {' '.join(command)}")
    return took, largest


if __name__ == "__main__":
    main()
