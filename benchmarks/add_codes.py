"""Adding keys to an inverted file on one core: plain faiss against ours, by width and code.

Keys are hidden states of a datastore: their first values where it is wider than asked, states of consecutive tokens
side by side where it is narrower. Both add the same keys to the same trained index, in turns, on one thread; the
processor's seconds of the best turn count, without loading torch (two seconds of a process).
  plain   add_with_ids, 100,000 keys at once, as the recipe of the kNN-LM paper does
  ours    as `distlm index add` adds a shard of a store of --store-keys keys
PQ has 16 values to a byte (16 bytes at least), PQx4 four to half a byte. PQx4fs is plain faiss's own type in memory,
whose lists cannot be joined on disk, against our PQx4, which has the same codes and is repacked when it is searched.

    python benchmarks/add_codes.py --store RUN/datastore [--out FILE]
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from shared.adding import Array, different, our_add, plain_add, wide_keys
from shared.command import Benchmark, Options, note, report, use_threads
from shared.store import random_keys, settings, write_store

from distlm.datastore.reader import Datastore
from distlm.index.build.integer_lists import multiplies_int8
from distlm.index.factory import build_factory, inverted_file
from distlm.index.layout import serialise


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(__doc__, rows=3000, widths=[16, 32], nlist=16, repeat=1, store_keys=3000)
    parser.add_input("--store", "datastore whose keys are taken")
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--nlist", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--store-keys", type=int, default=1_000_000, help="keys of the store that a shard is of")
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    use_threads(1)
    multiplies_int8()
    with tempfile.TemporaryDirectory() as name:
        if options.store is None:
            options.store = Path(name) / "datastore"
            write_store(options.store, options.rows + 1000, settings(16, 97, 20_000), random_keys(16))
        found = {str(width): dict(measured(width, options)) for width in options.widths}
    note("| width | code | plain, keys/s | ours, keys/s | ours / plain |\n|---|---|---|---|---|")
    for width, codes in found.items():
        for code, figures in codes.items():
            plain, ours, ratio = (figures[name] for name in ("plain_keys_per_s", "keys_per_s", "ratio"))
            note(f"| {width} | {code} | {plain:,} | {ours:,} | {ratio:.2f} |")
    least = min(figures["ratio"] for codes in found.values() for figures in codes.values())
    report({"rows": options.rows, "nlist": options.nlist, "least_ratio": least, "widths": found}, options)


def measured(width: int, options: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each code: keys per second of the processor, plain and ours, and what differs."""
    keys = keys_of(options.store, options.rows, width)
    centroids = trained_centroids(keys, options.nlist)
    for code in (f"PQ{min(width, max(16, width // 16))}", "SQ4", "SQ8", "RaBitQ", f"PQ{width // 4}x4"):
        template = trained(f"IVF{options.nlist},{code}", centroids, keys)
        plain, ours = turns(keys, template, template, options)
        found = {"plain": plain, "ours": ours}
        differ = different(found["plain"][1], found["ours"][1])
        note(f"{width} {code}: {plain[0] / ours[0]:.2f}; {differ}")
        yield code, {**figures(len(keys), plain[0], ours[0]), "codes_that_differ": differ}
        if code.endswith("x4"):
            fast = trained(f"IVF{options.nlist},{code}fs", centroids, keys)
            yield f"{code}fs", figures(len(keys), *(turn[0] for turn in turns(keys, fast, template, options)))


def figures(rows: int, plain: float, ours: float) -> dict[str, Any]:
    """Rates and their ratio from seconds."""
    return {"plain_keys_per_s": round(rows / plain), "keys_per_s": round(rows / ours), "ratio": round(plain / ours, 3)}


def turns(keys: Array, plain: bytes, ours: bytes, options: Options) -> list[tuple[float, Any]]:
    """Best seconds of plain faiss and of ours, and what they made, each adding to its trained index."""
    best = [(float("inf"), None), (float("inf"), None)]
    for _ in range(options.repeat):
        now = (
            spent(lambda: plain_add(plain, keys)),
            spent(lambda: our_add(ours, keys, 1, options.store_keys)),
        )
        best = [min(pair, key=lambda turn: turn[0]) for pair in zip(best, now, strict=True)]
    return best


def spent(act: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor, and what was made."""
    faiss.omp_set_num_threads(1)
    start = time.process_time()
    made = act()
    return time.process_time() - start, made


def keys_of(store: Path, rows: int, width: int) -> Array:
    """Keys fp16 [rows, width] of a store of any width."""
    own = Datastore.open(store).width
    keys: Array = np.ascontiguousarray(wide_keys(store, rows, max(own, width))[:, :width])
    return keys


def trained_centroids(keys: Array, nlist: int) -> Array:
    """Two iterations of faiss's k-means: enough for lists of usual lengths."""
    means = faiss.Kmeans(keys.shape[1], nlist, niter=2, seed=1, min_points_per_centroid=1)
    means.train(keys.astype(np.float32))
    return np.asarray(means.centroids)


def trained(factory: str, centroids: Array, keys: Array) -> bytes:
    """An index of the factory with these centroids; its codes are trained for some iterations."""
    index = build_factory(factory, keys.shape[1])
    inner = inverted_file(index)
    inner.quantizer.add(centroids)
    if hasattr(inner, "pq"):
        inner.pq.cp.niter, inner.pq.cp.min_points_per_centroid = 4, 1
    if hasattr(inner, "do_polysemous_training"):
        inner.do_polysemous_training = False
    index.train(keys[:8192].astype(np.float32))
    return serialise(index)


if __name__ == "__main__":
    main()
