"""Factories on the keys of a datastore beside plain faiss: recall and time of k and 2k candidates, keys added a second.

The first factory is also added to and searched by plain faiss. Turns are interleaved, and the fastest of each counts.
`nprobe` 0 reads all lists, so that only the codes count. `ms` is the index's search alone. The recall of more than k
candidates is had only when exact distances choose k of them: `ms_with_exact` has these, too, from keys in memory, as
`index tune` measures them; `knn search` reads the keys of many queries in one pass over the store instead.
docs/faiss-index.md has a table of it.

    python benchmarks/candidates.py --store DATASTORE [--factories IVF4096,PQ64 PCA128,IVF1024,SQ4 …] [--keys 0]
        [--queries 1000] [--k 1024] [--nprobe 16 32 64 256] [--turns 3] [--threads 1] [--out FILE]
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from shared.command import Benchmark, Options, note, report, use_threads
from shared.store import clustered_keys, settings, write_store

from distlm.datastore.reader import Datastore
from distlm.index.build.encode import Encoder
from distlm.index.choose.measure import RESCORED, Sample, draw_sample, recall, with_table
from distlm.index.choose.proposals import LEAST_KEYS_PER_LIST
from distlm.index.factory import Factory, fit_factory, inverted_file
from distlm.index.faiss_module import faiss_threads
from distlm.index.layout import deserialise
from distlm.index.search.searcher import SearchIndex, Shape, exact_places_distances
from distlm.index.train.template import Known, train_template

ADDED = 32768
"""Keys of one turn of adding."""
PLAIN_ADDED = 8192
"""The same of plain faiss."""


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(
        __doc__, queries=50, k=32, nprobe=[2, 0], turns=1,
        factories=["IVF16,PQ4", "PCA8,IVF16,SQ4", "PCAR8,IVF16,RaBitQ"],
    )  # fmt: skip
    parser.add_input("--store", "folder of a finished datastore")
    parser.add_argument(
        "--factories", nargs="+", default=["IVF4096,PQ64", "PCA128,IVF1024,SQ4", "PCAR448,IVF1024,RaBitQ"]
    )
    parser.add_argument("--keys", type=int, default=0, help="keys that are indexed; 0: all but the queries")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--nprobe", type=int, nargs="+", default=[16, 32, 64, 256])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    use_threads(options.threads)
    if options.store is not None:
        report(compare(options, Datastore.open(options.store)), options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "store", 2000, settings(16, 97, 1000), clustered_keys(2000, 16, 97))
        report(compare(options, Datastore.open(Path(folder) / "store")), options)


def compare(options: Options, store: Datastore) -> dict[str, Any]:
    """All figures."""
    sample = draw_sample(store, options.keys or store.rows - options.queries, options.queries, options.k, 1)
    rows, width = sample.keys.shape
    known: Known = {}
    trained: dict[str, tuple[Factory, bytes]] = {}
    result: dict[str, Any] = {"keys": rows, "width": width, "k": options.k, "factories": {}}
    for name in options.factories:
        factory = fit_factory(name, width, rows, rows, LEAST_KEYS_PER_LIST)
        seconds, template = _timed(
            lambda factory=factory: train_template(factory, sample.keys, 1, options.threads, known)  # type: ignore[misc]
        )
        trained[name] = factory, template
        result["factories"][name] = {"used": factory.used, "bytes": factory.code_size, "train_s": seconds}
        note(f"{name}: trained in {seconds:.1f} s")
    _add(options, sample, trained, result)
    _search(options, sample, trained, result)
    return result


def _timed(act: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = act()
    return time.perf_counter() - start, found


def _added(template: bytes, keys: Any, threads: int) -> Any:
    index = deserialise(template)
    with Encoder(index, threads) as encoder:
        for first in range(0, len(keys), encoder.batch):
            part = keys[first : first + encoder.batch]
            encoder.add(part, np.arange(first, first + len(part), dtype=np.int64))
    return index


def _add(options: Options, sample: Sample, trained: dict[str, tuple[Factory, bytes]], result: dict[str, Any]) -> None:
    """Keys added a second, ours and of plain faiss."""
    keys, few = sample.keys[:ADDED], sample.keys[:PLAIN_ADDED]
    least: dict[str, float] = {}
    for _ in range(options.turns):
        for name, (_, template) in trained.items():
            seconds, _ = _timed(lambda template=template: _added(template, keys, options.threads))  # type: ignore[misc]
            least[name] = min(least.get(name, np.inf), seconds / len(keys))
        index = deserialise(next(iter(trained.values()))[1])
        with faiss_threads(options.threads):
            seconds, _ = _timed(lambda index=index: index.add_with_ids(few, np.arange(len(few))))  # type: ignore[misc]
        least["plain"] = min(least.get("plain", np.inf), seconds / len(few))
    for name, each in least.items():
        figures = result if name == "plain" else result["factories"][name]
        figures["plain_added_s" if name == "plain" else "added_s"] = round(1 / each)


def _search(
    options: Options, sample: Sample, trained: dict[str, tuple[Factory, bytes]], result: dict[str, Any]
) -> None:
    """Recall and milliseconds per query by nprobe and candidates, ours and of plain faiss."""
    indexes, counts = {}, (options.k, 2 * options.k)
    rows, width = sample.keys.shape
    plain: Any = None
    for name, (factory, template) in trained.items():
        index = with_table(_added(template, sample.keys, options.threads))
        indexes[name] = SearchIndex(index, Shape(rows, width, factory.nlist), Path(name))
        if "plain" not in result:
            plain, result["plain"] = with_table(index), {}
    some, exact = slice(0, RESCORED), np.inf
    for _ in range(options.turns):
        for nprobe in options.nprobe:
            inverted_file(plain).nprobe = nprobe or trained[options.factories[0]][0].nlist
            with faiss_threads(options.threads):
                seconds, found = _timed(lambda: plain.search(sample.queries, options.k))
            _keep(result["plain"], f"nprobe {nprobe or 'all'}, of {options.k}", seconds, found[1], sample)
            for name, index in indexes.items():
                for count in counts:
                    lists = nprobe or index.nlist
                    seconds, (ids, _) = _timed(lambda i=index, c=count, p=lists: i.search(sample.queries, c, p))  # type: ignore[misc]
                    of = result["factories"][name].setdefault("search", {})
                    _keep(of, f"nprobe {nprobe or 'all'}, of {count}", seconds, ids, sample)
        # Of the last search, which found the most: its time is that of the candidates' number.
        asked = sample.queries[some]
        seconds, _ = _timed(partial(exact_places_distances, sample.keys, asked, ids[some]))
        exact = min(exact, 1000 * seconds / len(asked))
    result["exact_ms"] = {f"of {counts[-1]}": exact}
    for name in indexes:
        for place, figures in result["factories"][name]["search"].items():
            if place.endswith(f", of {counts[-1]}"):
                figures["ms_with_exact"] = figures["ms"] + exact


def _keep(figures: dict[str, Any], name: str, seconds: float, ids: Any, sample: Sample) -> None:
    each = 1000 * seconds / len(sample.queries)
    if name not in figures:
        figures[name] = {"recall": round(recall(ids, sample.exact), 4), "ms": each}
    figures[name]["ms"] = min(figures[name]["ms"], each)


if __name__ == "__main__":
    main()
