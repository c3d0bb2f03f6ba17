"""Building and searching an index: the recipe of the kNN-LM paper as plain faiss runs it, against ours.

Keys are hidden states of a datastore; where it is narrower than --width, a key is the states of consecutive tokens side
by side (row t holds tokens t − 3 … t), so that they are as wide as the paper's and still those of a language model.
  plain        IndexIVFPQ(4096 lists, PQ64), trained by faiss, added in chunks of 100,000, searched in one batch
  ours, same   the same factory: training, and adding to the very same trained index; codes are compared
  ours, pick   --pick: training, adding, searching
in turns, on all cores, and recall of both against exact neighbours that faiss finds by brute force.
With --ranks instead: adding the same keys on 1 and on 2 ranks of one thread each, and, for what two busy processes of
this machine can do at best, multiplies matrices in 1 and in 2 processes.

    python benchmarks/index.py --store RUN/datastore [--rows 400000] [--pick PCA256,IVF4096,PQ128x4] [--out FILE]
"""

import tempfile
import time
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from shared import process
from shared.adding import CHUNK, Array, different, our_add, plain_add, wide_keys
from shared.command import Benchmark, Options, note, report, use_threads
from shared.store import random_keys, settings, write_store

from distlm.index.build.encode import Encoder
from distlm.index.choose.measure import recall, with_table
from distlm.index.factory import fit_factory, inverted_file
from distlm.index.layout import deserialise, serialise
from distlm.index.search.searcher import SearchIndex, Shape
from distlm.index.train.template import train_template


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(
        __doc__, rows=50_000, sample=2000, width=64, nlist=16, codes=4, pick="PCA16,IVF16,PQ8x4", queries=50, k=16,
        nprobe=4, repeat=1, worker_s=0.1,
    )  # fmt: skip
    parser.add_input("--store", "datastore whose keys are taken")
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--sample", type=int, default=400_000, help="keys that train")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--nlist", type=int, default=4096)
    parser.add_argument("--codes", type=int, default=64, help="bytes of PQ of the plain index, and of `ours, same`")
    parser.add_argument("--pick", default="PCA256,IVF4096,PQ128x4")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--nprobe", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--ranks", action="store_true", help="only the part with 1 and 2 ranks")
    parser.add_argument("--worker-s", type=float, default=10.0, help="with --ranks: seconds of each work")
    parser.add_argument("--worker", nargs=4, help=SUPPRESS)
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    if options.worker:
        work, folder, rank, count = options.worker
        print(add(Path(folder), int(rank), int(count), options) if work == "add" else multiply(options))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.store is None:
            options.store = folder / "datastore"
            write_store(options.store, options.rows + 1000, settings(16, 97, 20_000), random_keys(16))
        report(two_ranks(options, folder) if options.ranks else measure(options), options)


def seconds(act: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = act()
    return time.perf_counter() - start, found


def measure(options: Options) -> dict[str, Any]:
    """Seconds of each way in every turn, recalls, and ratios of the best turns."""
    cores = use_threads()
    faiss.omp_set_num_threads(cores)
    keys = wide_keys(options.store, options.rows + options.queries, options.width)
    asked = np.zeros(len(keys), bool)
    asked[np.random.default_rng(0).choice(len(keys), options.queries, replace=False)] = True
    queries, keys = keys[asked].astype(np.float32), keys[~asked]
    sample = keys[np.sort(np.random.default_rng(1).choice(len(keys), options.sample, replace=False))].astype(np.float32)
    exact = brute(keys, queries, options.k)
    same = f"IVF{options.nlist},PQ{options.codes}"
    times: dict[str, list[float]] = {}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        took, found = seconds(act)
        times.setdefault(name, []).append(took)
        note(f"{name}: {took:.1f} s")
        return found

    plain = timed("train: plain", lambda: plain_train(sample, options))
    trained = serialise(plain)
    ours = fit_factory(same, options.width, len(keys), options.sample)
    timed("train: ours, same", lambda: train_template(ours, sample, 1, cores))
    pick = fit_factory(options.pick, options.width, len(keys), options.sample)
    template = timed("train: ours, pick", lambda: train_template(pick, sample, 1, cores))
    faiss.omp_set_num_threads(cores)
    for _ in range(options.repeat):
        plain = timed("add: plain", lambda: plain_add(trained, keys))
        mine = timed("add: ours, same", lambda: our_add(trained, keys, cores, len(keys)))
        differ = different(plain, mine)
        picked = timed("add: ours, pick", lambda: our_add(template, keys, cores, len(keys)))
        faiss.omp_set_num_threads(cores)
    searched_plain: Any
    searched_plain, searched_mine, searched = (with_table(index) for index in (plain, mine, picked))
    inverted_file(searched_plain).nprobe = options.nprobe
    mine_index = SearchIndex(searched_mine, Shape(len(keys), options.width, ours.nlist), Path("same"))
    pick_index = SearchIndex(searched, Shape(len(keys), options.width, pick.nlist), Path("pick"))
    for _ in range(options.repeat):
        faiss.omp_set_num_threads(cores)
        found_plain = timed("search: plain", lambda: searched_plain.search(queries, options.k)[1])
        found_mine = timed("search: ours, same", lambda: mine_index.search(queries, options.k, options.nprobe)[0])
        found_pick = timed("search: ours, pick", lambda: pick_index.search(queries, options.k, options.nprobe)[0])
    best = {name: min(turns) for name, turns in times.items()}
    return {
        "keys": len(keys), "width": options.width, "queries": len(queries), "k": options.k, "nprobe": options.nprobe,
        "same": ours.used, "pick": pick.used, "key_bytes": {"same": ours.key_bytes, "pick": pick.key_bytes},
        "seconds": {name: [round(took, 2) for took in turns] for name, turns in times.items()},
        "codes_that_differ": differ,
        "recall": {"plain": round(recall(found_plain, exact), 4), "ours, same": round(recall(found_mine, exact), 4),
                   "ours, pick": round(recall(found_pick, exact), 4)},
        "times_as_fast": {name: round(best[f"{name.split(':')[0]}: plain"] / value, 2)
                          for name, value in best.items() if "plain" not in name},
    }  # fmt: skip


def brute(keys: Array, queries: Array, k: int) -> Array:
    """Exact nearest keys, in chunks."""
    heaps = faiss.ResultHeap(len(queries), k)
    for start in range(0, len(keys), CHUNK):
        chunk = keys[start : start + CHUNK].astype(np.float32)
        distances, ids = faiss.knn(queries, chunk, k)
        heaps.add_result(distances, ids + start)
    heaps.finalize()
    return heaps.I


def plain_train(sample: Array, options: Options) -> Any:
    """The paper's index, as its recipe trains it."""
    quantizer = faiss.IndexFlatL2(options.width)
    index = faiss.IndexIVFPQ(quantizer, options.width, options.nlist, options.codes, 8)
    index.referenced_objects = [quantizer]  # type: ignore[attr-defined]
    index.train(sample)
    return index


def two_ranks(options: Options, folder: Path) -> dict[str, Any]:
    """Units per second of adding on 1 and 2 ranks of one thread each, and of multiplying matrices in so many."""
    keys = wide_keys(options.store, options.rows, options.width)
    np.save(folder / "keys.npy", keys)
    sample = keys[:: max(1, len(keys) // 20_000)].astype(np.float32)
    faiss.omp_set_num_threads(use_threads())
    index: Any = faiss.index_factory(options.width, f"IVF{options.nlist},PQ{options.codes}")
    # It is added to, not searched: any centroids will do, and codes in any order.
    index.cp.niter, index.pq.cp.niter, index.cp.min_points_per_centroid = 1, 1, 1
    index.do_polysemous_training = False
    index.train(sample)
    (folder / "trained").write_bytes(serialise(index))
    rates: dict[str, list[float]] = {}
    for _ in range(options.repeat):
        for work in ("add", "multiply"):
            for count in (1, 2):
                words = ["--store", options.store, "--worker-s", options.worker_s, "--worker", work, folder]
                workers = [process.start(__file__, [*words, rank, count], threads=1) for rank in range(count)]
                rates.setdefault(f"{work}, {count}", []).append(round(sum(map(process.result, workers)), 1))
    best = {name: max(turns) for name, turns in rates.items()}
    return {
        "units_per_s": rates,
        "two_over_one": {work: round(best[f"{work}, 2"] / best[f"{work}, 1"], 2) for work in ("add", "multiply")},
    }


def add(folder: Path, rank: int, count: int, options: Options) -> float:
    """Keys per second; rank r takes every count-th batch."""
    keys = np.load(folder / "keys.npy", mmap_mode="r")
    index = deserialise((folder / "trained").read_bytes())
    with Encoder(index, 1, keys=len(keys)) as encoder:
        starts = range(rank * encoder.batch, len(keys) - encoder.batch, count * encoder.batch)
        done, began = 0, time.perf_counter()
        for start in starts:
            batch = keys[start : start + encoder.batch].astype(np.float32)
            encoder.add(batch, np.arange(start, start + len(batch)))
            done += len(batch)
            if time.perf_counter() - began > options.worker_s:
                break
        return done / (time.perf_counter() - began)


def multiply(options: Options) -> float:
    """Products of 1,024 × 1,024 matrices per second."""
    left = np.ones((1024, 1024), np.float32)
    left @ left
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < options.worker_s:
        left @ left
        done += 1
    return done / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
