"""Training an index: faiss on one thread against ours on 1 and 2 ranks of one thread each.

All train the same factory on the same keys of a datastore. Compared are seconds (of the wall, and of the processors of
all ranks), the largest resident set of a rank, the squared distance of the keys to their nearest centroid, and recall:
other keys of the store are searched by each in an index of the keys, against exact neighbours.

    python benchmarks/index_train.py --store RUN/datastore [--factory IVF2048,PQ64] [--out FILE]
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from shared.clock import own_peak
from shared.command import Benchmark, Options, note, report, use_threads
from shared.store import random_keys, settings, write_store

from distlm.config import load_config
from distlm.datastore.reader import Datastore
from distlm.index.build.encode import transforms_of
from distlm.index.choose.measure import recall, with_table
from distlm.index.factory import build_factory, fit_factory, inverted_file
from distlm.index.layout import Array, deserialise, serialise
from distlm.index.train.sample import StoreSample
from distlm.index.train.team import Team
from distlm.index.train.template import trained
from distlm.pipeline import stage_environment
from distlm.runtime.ranks.comm import open_comm
from distlm.runtime.ranks.world import resolve_world

RANKS = (1, 2)


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(__doc__, factory="IVF16,PQ4", sample=4000, queries=50, k=16, nprobe=4, repeat=1)
    parser.add_input("--store", "datastore whose keys train")
    parser.add_argument("--factory", default="IVF2048,PQ64")
    parser.add_argument("--sample", type=int, default=131_072, help="keys that train, and that are searched")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--nprobe", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=SUPPRESS)
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    use_threads(1)
    with tempfile.TemporaryDirectory() as name:
        if options.worker:
            train_here(options.worker, options)
            return
        if options.store is None:
            options.store = Path(name) / "datastore"
            write_store(options.store, options.sample + 1000, settings(16, 97, 2000), random_keys(16))
        report(measure(Path(name), options), options)


def measure(folder: Path, options: Options) -> dict[str, Any]:
    """What each way took, and how good its index is."""
    store = Datastore.open(options.store)
    plan = fit_factory(options.factory, store.width, store.rows, options.sample)
    sample = StoreSample(store, plan.sample, 1)
    keys = sample.read(np.arange(sample.rows)).astype(np.float32)
    others = np.setdiff1d(np.arange(store.rows), sample.numbers)
    drawn = np.sort(np.random.default_rng(0).choice(others, min(options.queries, len(others)), replace=False))
    queries = np.ascontiguousarray(store[drawn][0], np.float32)
    templates: dict[str, bytes] = {}
    turns: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.repeat):
        faiss.omp_set_num_threads(1)
        began = np.array([time.perf_counter(), time.process_time()])
        index = build_factory(plan.used, store.width)
        if hasattr(inverted_file(index), "do_polysemous_training"):
            # Orders codes for a search that nobody does here.
            inverted_file(index).do_polysemous_training = False
        index.train(keys)
        wall, processor = np.array([time.perf_counter(), time.process_time()]) - began
        templates["faiss"] = serialise(index)
        turns.setdefault("faiss", []).append({"seconds": wall, "processor_s": processor})
        for ranks in RANKS:
            out = folder / str(ranks)
            turns.setdefault(f"{ranks} ranks", []).append(on_ranks(ranks, out, options))
            templates[f"{ranks} ranks"] = out.read_bytes()
        note(json.dumps({name: taken[-1] for name, taken in turns.items()}))
    best = {name: {what: min(turn[what] for turn in taken) for what in taken[0]} for name, taken in turns.items()}
    exact = faiss.knn(queries, keys, options.k)[1]
    quality = {name: judged(templates[name], keys, queries, exact, options) for name in ("faiss", "1 ranks")}
    faiss_best, one, two = (best[name] for name in ("faiss", "1 ranks", "2 ranks"))
    return {
        "factory": plan.used, "keys": len(keys), "width": store.width, "turns": turns, "quality": quality,
        "same_bytes": templates["1 ranks"] == templates["2 ranks"],
        "ratios": {
            "processor, 1 rank / faiss": round(one["processor_s"] / faiss_best["processor_s"], 3),
            "seconds, 1 rank / 2 ranks": round(one["seconds"] / two["seconds"], 3),
            "memory, 2 ranks / 1 rank": round(two["peak_MB"] / one["peak_MB"], 3),
            "distance, ours / faiss": round(quality["1 ranks"]["distance"] / quality["faiss"]["distance"], 5),
            "recall, ours - faiss": round(quality["1 ranks"]["recall"] - quality["faiss"]["recall"], 4),
        },
    }  # fmt: skip


def on_ranks(ranks: int, out: Path, options: Options) -> dict[str, float]:
    """Train on so many ranks, each a process of one thread; the template goes to `out`."""
    words = [__file__, "--store", options.store, "--factory", options.factory, "--sample", options.sample]
    launcher = [Path(sys.executable).parent / "mpirun", "--oversubscribe", "--bind-to", "none", "-n", ranks]
    command = [*(launcher if ranks > 1 else []), sys.executable, *words, "--worker", out]
    with stage_environment(load_config("demo", [f"launch.ranks={ranks}", "launch.threads=1"])) as environment:
        done = subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"exit {done.returncode}: {command}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def train_here(out: Path, options: Options) -> None:
    """One rank's part. Rank 0 prints what training took, without the start of the processes."""
    comm = open_comm(resolve_world())
    store = Datastore.open(options.store)
    plan = fit_factory(options.factory, store.width, store.rows, options.sample)
    comm.barrier()
    began = np.array([time.perf_counter(), time.process_time()])
    template = trained(plan, StoreSample(store, plan.sample, 1), 1, Team(comm))
    comm.barrier()
    wall, processor = np.array([time.perf_counter(), time.process_time()]) - began
    peaks = comm.allgather(own_peak())
    processors = comm.allgather(processor)
    if comm.rank == 0:
        out.write_bytes(template)
        print(json.dumps({"seconds": wall, "processor_s": sum(processors), "peak_MB": max(peaks) / 1e6}))
    comm.close()


def judged(template: bytes, keys: Array, queries: Array, exact: Array, options: Options) -> dict[str, float]:
    """Squared distance of the keys to their centroids, and recall of an index of them."""
    index = deserialise(template)
    index.add(keys)
    searched: Any = with_table(index)
    inner = inverted_file(searched)
    inner.nprobe = options.nprobe
    centroids = inner.quantizer.reconstruct_n(0, inner.nlist)
    for transform in transforms_of(searched):
        keys = transform.apply(keys)
    found = searched.search(queries, options.k)[1]
    return {
        "distance": float(faiss.knn(keys, centroids, 1)[0].sum(dtype=np.float64)),
        "recall": round(recall(found, exact), 4),
    }


if __name__ == "__main__":
    main()
