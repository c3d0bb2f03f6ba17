"""Exact kNN-LM scores: random reads, query by query, against one sorted pass over the keys.

Both start from the same searched neighbours and end with log p_kNN(target). The random way is what the published
kNN-LM code does with its default settings: `keys[ids]` from the memory-mapped fp16 keys, cast to fp32, squared L2,
softmax over the neighbours. The sorted way is distlm's (knnlm/search/rescore.py). Three states of the page cache:

  cold     the key files are dropped from the page cache once, before the first query
  larger   dropped before every query of the random way: a store much larger than memory, which never gets warm
           (WikiText-103 has 211 GB of keys); the sorted way reads each key once, so for it this is `cold`
  warm     everything is in memory before the first query

    python benchmarks/rescoring.py --run-dir runs/wikitext2 [--split valid] [--out FILE.json]
    python benchmarks/rescoring.py --rows 2000000 --width 256 --queries 50000 [--k 1024] [--out FILE.json]

With --run-dir: a run with a finished store, index and neighbours. Otherwise a synthetic store of clustered keys.
--sample limits the queries of the random way (0: all); rates are tokens per second, the best of --repeat turns (every
stage of a turn after the other, so that other work on the machine falls on all of them). --index names index folders
of the same store to be used in place of the run's: the first one's neighbours are scored, all are searched and, with
--recall, compared with brute force. core_us_per_token gives the processor time of the same turns, over all cores: on a
machine shared with other work it is the steadier figure; it has no meaning where the disk is waited for.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from shared.clock import Best, Seconds, clock
from shared.command import Benchmark, Options, note, report, use_threads
from shared.store import clustered_keys, settings, write_store

from distlm.config import load_config
from distlm.datastore.manifest import keys_path
from distlm.datastore.reader import Datastore
from distlm.index import SearchIndex, brute_search, open_index, run_index_build
from distlm.index.pairs import sort_pairs
from distlm.knnlm.scoring import knn_log_probs
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.rescore import GroupScorer, nearest_first, plan_groups, unit_distances
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import open_stage

EVICTED = 64
"""Queries of the random way with a cold cache each."""
UNIT = 6912
"""Queries of a unit: 16 evaluation blocks of 432 tokens on average."""


@dataclass(frozen=True)
class Case:
    """What both ways are given."""

    store: Datastore
    queries: np.ndarray
    targets: np.ndarray
    searches: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    """By the name of the index; the neighbours of the first are scored."""
    k: int
    nprobe: int
    about: dict[str, object]


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(
        __doc__, rows=8000, width=16, queries=300, k=16, nprobe=4, factory="IVF16,PQ4x4", rows_per_shard=3000,
        index_sample=2000, sample=200, recall=20,
    )  # fmt: skip
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--split", default="valid")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--queries", type=int, default=20_000, help="with --run-dir: at most so many (0: all)")
    parser.add_argument("--k", type=int, help="default: the run's, 1024 without a run")
    parser.add_argument("--nprobe", type=int, help="default: the run's, 32 without a run")
    parser.add_argument("--index", type=Path, nargs="+", help="with --run-dir: index folders in place of the run's")
    parser.add_argument("--recall", type=int, default=0, help="queries compared with brute force (0: none)")
    parser.add_argument("--repeat", type=int, default=1, help="turns of every measurement that is not of a cold cache")
    parser.add_argument("--factory", default="IVF1024,PQ32")
    parser.add_argument("--sample", type=int, default=8192, help="queries of the random way (0: all)")
    parser.add_argument("--batch", type=int, default=64, help="queries of one gather of the random way")
    parser.add_argument("--rows-per-shard", type=int, default=250_000, help="of the synthetic store")
    parser.add_argument("--index-sample", type=int, default=65_536, help="keys that train the synthetic store's index")
    parser.add_threads()
    parser.add_argument("--folder", type=Path, help="where the synthetic store is built and removed again")
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    torch.set_num_threads(use_threads(options.threads))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        case = from_run(options) if options.run_dir else synthetic(options, Path(folder))
        report(measure(case, options), options)


def measure(case: Case, options: Options) -> dict[str, object]:
    """Seconds per token of search and of each way of scoring, and their ratios."""
    searched, ours, random = Best(), Best(), Best()
    found: dict[str, np.ndarray] = {}
    count = len(case.queries)
    for turn in range(options.repeat):
        for name, search in case.searches.items():
            note(f"search {name}: {count} queries, k={case.k}, turn {turn}")
            spent, found[name] = timed(partial(in_units, search, case.queries))
            searched.keep(name, spent, count)
    first, ids = next(iter(found.items()))
    recall = {name: recall_of(case, found[name], options.recall) for name in found} if options.recall else {}
    values = np.concatenate([np.asarray(case.store.values(shard.index)) for shard in case.store.shards])
    neighbour_values = np.where(ids < 0, -1, values[ids])
    sample = min(options.sample or count, count)
    few = slice(0, sample)

    note("sorted pass, cold")
    drop_cache(case.store)
    spent, mine = timed(lambda: sorted_pass(case, ids, neighbour_values))
    for state in ("cold", "larger"):
        ours.keep(state, spent, count)
    read_all(case.store)
    for turn in range(options.repeat):
        note(f"sorted pass and random reads, warm, turn {turn}")
        spent, _ = timed(lambda: sorted_pass(case, ids, neighbour_values))
        ours.keep("warm", spent, count)
        spent, theirs = random_reads(case, ids[few], neighbour_values[few], options.batch)
        random.keep("warm", spent, sample)

    note(f"random reads of {sample} queries, cold")
    drop_cache(case.store)
    random.keep("cold", random_reads(case, ids[few], neighbour_values[few], options.batch)[0], sample)
    few = slice(0, min(sample, EVICTED))
    note("random reads, cache dropped before every query")
    random.keep("larger", random_reads(case, ids[few], neighbour_values[few], 1, evict=True)[0], few.stop)

    finite = np.isfinite(theirs) & np.isfinite(mine[:sample])
    assert (np.isfinite(theirs) == np.isfinite(mine[:sample])).all()
    return {
        **case.about,
        "queries": count, "k": case.k, "random_sample": sample, "threads": torch.get_num_threads(),
        "recall": recall,
        "largest_difference_of_log_p": float(np.abs(theirs[finite] - mine[:sample][finite]).max()),
        "tokens_per_s": {
            name: {state: round(1 / seconds, 1) for state, seconds in best.wall.items()}
            for name, best in (("search", searched), ("random_scoring", random), ("sorted_scoring", ours))
        },
        "core_us_per_token": {
            **{f"search {name}": micro(seconds) for name, seconds in searched.processor.items()},
            "sorted scoring": micro(ours.processor["warm"]), "random scoring": micro(random.processor["warm"]),
        },
        "ratios": {
            state: ratios(searched.wall[first], random.wall[state], ours.wall[state]) for state in random.wall
        } | {
            "warm, processor time":
                ratios(searched.processor[first], random.processor["warm"], ours.processor["warm"]),
        },
    }  # fmt: skip


def ratios(search: float, random: float, ours: float) -> dict[str, float]:
    """How many times faster the sorted way is: by seconds per token of the search and of both ways of scoring."""
    return {
        "scoring": round(random / ours, 2),
        "random scoring / (search + sorted scoring)": round(random / (search + ours), 2),
        "(search + random) / (search + sorted)": round((search + random) / (search + ours), 2),
    }


def micro(seconds: float) -> float:
    return round(1e6 * seconds, 1)


def in_units(search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray) -> np.ndarray:
    """Neighbours [Q, k], searched as `distlm knn search` does: a unit after the other."""
    return np.concatenate([search(queries[i : i + UNIT]) for i in range(0, len(queries), UNIT)])


def recall_of(case: Case, ids: np.ndarray, count: int) -> float:
    """Share of the true k nearest among the neighbours of `count` queries, spread evenly."""
    picked = np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)
    true, _ = brute_search(case.store, case.queries[picked].astype(np.float32), case.k)
    return round(
        float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(true, ids[picked], strict=True)])) / case.k, 4
    )


def sorted_pass(case: Case, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """log p_kNN fp64 [Q] by the code of `distlm knn search` and `tune`, without its files."""
    result = np.empty(len(ids))
    for unit, distances, ordered in sorted_units(case, ids, values):
        result[unit] = knn_log_probs(distances, ordered, case.targets[unit], 1.0)[0]
    return result


def sorted_units(case: Case, ids: np.ndarray, values: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Each unit of tokens with its exact distances [q, k], nearest first, and the values in that order."""
    store, shards = case.store, case.store.shards
    units = [slice(first, min(first + UNIT, len(ids))) for first in range(0, len(ids), UNIT)]
    counts = [unit.stop - unit.start for unit in units]
    edges = [*(shard.first_row for shard in shards), store.rows]
    for group in plan_groups(counts, case.k, store.width):
        pairs = [sort_pairs(ids[units[number]]) for number in group]
        inside = np.stack([np.diff(pair.bounds(edges)) for pair in pairs])
        scorer = GroupScorer(
            case.queries[units[group[0]].start : units[group[-1]].stop], pairs, [counts[n] for n in group]
        )
        pieces = [scorer.shard(store.keys(shard.index), shard.first_row) for shard in shards]
        starts = np.cumsum(inside, axis=0) - inside
        for place, number in enumerate(group):
            cut = [piece[a : a + n] for piece, a, n in zip(pieces, starts[place], inside[place], strict=True)]
            distances = unit_distances(pairs[place], counts[number], cut)
            unit = units[number]
            _, distances, ordered = nearest_first(ids[unit], distances, values[unit])
            yield unit, distances, ordered


def random_reads(
    case: Case, ids: np.ndarray, values: np.ndarray, batch: int, evict: bool = False
) -> tuple[Seconds, np.ndarray]:
    """The clocks' seconds and log p_kNN fp64 [Q], reading the keys of each batch of queries where they lie."""
    shards = case.store.shards
    seconds, result = np.zeros(2), np.empty(len(ids))
    firsts = np.array([shard.first_row for shard in shards])
    for first in range(0, len(ids), batch):
        rows = ids[first : first + batch]
        if evict:
            drop_cache(case.store)
        maps = [case.store.keys(shard.index) for shard in shards]
        start = clock()
        gathered = np.empty((*rows.shape, case.store.width), maps[0].dtype)
        present = np.maximum(rows, 0)
        if len(maps) == 1:
            gathered[:] = maps[0][present]
        else:
            owner = np.searchsorted(firsts, present, side="right") - 1
            for number, keys in enumerate(maps):
                here = owner == number
                gathered[here] = keys[present[here] - firsts[number]]
        keys32 = torch.from_numpy(gathered).float()
        queries = torch.from_numpy(case.queries[first : first + len(rows)].astype(np.float32))
        distances = torch.sum((queries[:, None] - keys32) ** 2, dim=2)
        distances[torch.from_numpy(rows < 0)] = float("inf")
        scores = torch.log_softmax(-distances.double(), dim=1)
        hits = torch.from_numpy(values[first : first + batch] == case.targets[first : first + len(rows), None])
        result[first : first + batch] = torch.logsumexp(scores.masked_fill(~hits, -float("inf")), dim=1).numpy()
        seconds += clock() - start
        # A page that is still mapped cannot be dropped.
        maps = keys = None  # type: ignore[assignment]
    return seconds, result


def from_run(options: Options) -> Case:
    """The store, index and evaluation queries of a run."""
    run = RunDir(options.run_dir)
    store = Datastore.open(run.datastore)
    neighbours = Neighbours.open(run.neighbours(options.split))
    indexes = [open_index(folder, store) for folder in options.index or [run.index]]
    k, nprobe = options.k or neighbours.k, options.nprobe or neighbours.manifest.nprobe or 0
    last = options.queries or neighbours.tokens
    queries = np.concatenate([np.asarray(unit.queries) for unit in neighbours.units()])[:last]
    targets = np.concatenate([np.asarray(unit.targets) for unit in neighbours.units()])[:last]
    about = describe(store, indexes[0], nprobe) | {"source": f"{run.root.name}, {options.split}"}
    searches = {factory_of(index): partial(search_ids, index, k, nprobe) for index in indexes}
    return Case(store, queries, targets, searches, k, nprobe, about)


def factory_of(index: SearchIndex) -> str:
    assert index.record is not None
    return index.record.factory


def search_ids(index: SearchIndex, k: int, nprobe: int, queries: np.ndarray) -> np.ndarray:
    return index.search(queries.astype(np.float32), k, nprobe)[0]


def synthetic(options: Options, folder: Path) -> Case:
    """Clustered keys in several shards, an index of them, and queries near stored keys."""
    note(f"building a store of {options.rows} x {options.width} and its index in {folder}")
    draw = clustered_keys(options.rows, options.width, vocabulary=30_000)
    run_dir = folder / "run"
    write_store(RunDir(run_dir).datastore, options.rows, settings(options.width, 30_000, options.rows_per_shard), draw)
    overrides = [f"run_dir={run_dir}", f"index.factory={options.factory}", f"index.sample={options.index_sample}"]
    config = load_config("demo", [*overrides, f"launch.threads={torch.get_num_threads()}"])
    with open_stage("index", config) as stage:
        run_index_build(stage)
    run = RunDir.of(config)
    store = Datastore.open(run.datastore)
    opened = open_index(run.index, store)
    queries, targets = draw(options.queries)
    k, nprobe = options.k or 1024, options.nprobe or 32
    about = describe(store, opened, nprobe) | {"source": "synthetic"}
    searches = {factory_of(opened): partial(search_ids, opened, k, nprobe)}
    return Case(store, queries, targets, searches, k, nprobe, about)


def describe(store: Datastore, index: SearchIndex, nprobe: int) -> dict[str, object]:
    return {
        "rows": store.rows, "width": store.width, "key_dtype": store.key_dtype.name, "shards": len(store.shards),
        "factory": factory_of(index), "nprobe": nprobe, "fast_scan": index.fast_scan,
    }  # fmt: skip


def drop_cache(store: Datastore) -> None:
    """Drop the key files from the page cache (clean pages that nothing has mapped)."""
    for shard in store.shards:
        descriptor = os.open(keys_path(store.folder, shard.index), os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(store: Datastore) -> None:
    """Bring the key files into the page cache."""
    for shard in store.shards:
        with keys_path(store.folder, shard.index).open("rb") as stream:
            while stream.read(8 << 20):
                pass


def timed(action: Callable[[], np.ndarray]) -> tuple[Seconds, np.ndarray]:
    start = clock()
    result = action()
    return clock() - start, result


if __name__ == "__main__":
    main()
