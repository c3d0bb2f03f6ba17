"""Evaluation of a kNN-LM: the original's method against distlm's, on one index in one run; and tuning from files.

The original (Khandelwal et al. 2020) evaluates batch by batch: search the index for the batch's hidden states, read the
neighbours' keys where they lie in the memory-mapped file, squared L2 in fp32, log-softmax over the neighbours, and the
target's share of it. That share is taken in two ways, each with its own total: `mask`, the original's (a mask of the
neighbours whose value is the target), and `dense`, that of its ports to other frameworks (a [tokens × vocabulary] array
that the neighbours' probabilities are added into). Both are written here from that description. The index is the same
file; batches are searched as the original does, by faiss's own search of it, and once more by distlm's (`ours
searched`), which tells what of the ratio is the search's.

distlm searches units of many blocks, reads the keys once in order, keeps the neighbours (that is the first evaluation),
and from then on evaluates from what was kept (every further one, with other λ, T and k too).

    python benchmarks/knn_eval.py --run-dir runs/wikitext2 [--split valid] [--k 1024] [--out FILE.json]

Rates are tokens per second of the best of --repeat turns, in which every way has its turn; core_us_per_token is the
processor time over all cores of the same turns, which other work on the machine disturbs less. The original is timed on
--sample tokens, spread in whole batches over the --queries tokens that distlm is timed on; the two perplexities of the
same tokens (λ = 0.25, T = 1, as in the original) must agree to 1e-6, relatively. Tuning is timed on the kept
neighbours, repeated to --tune-tokens: a grid of 10 λ × 10 T × 6 k.
"""

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from rescoring import UNIT, Case, from_run, micro, read_all, sorted_units
from shared.clock import Best, Seconds, clock
from shared.command import Benchmark, Options, note, report, use_threads
from shared.run import finished_run

from distlm.config import load_config
from distlm.index.layout import IndexFolder
from distlm.knnlm.scoring import interpolate, knn_log_probs, mean_loss
from distlm.knnlm.search.neighbours import ARRAYS, Neighbours, Unit
from distlm.knnlm.tune.grid import grid_losses
from distlm.runtime.rundir import RunDir

WAYS = ("original mask", "original dense")
OURS = ", ours searched"
WEIGHT = 0.25
"""λ of the perplexities that are compared."""


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(__doc__, k=16, queries=1000, sample=64, batch=32, tune_tokens=2000)
    parser.add_input("--run-dir", "run with a store, an index and neighbours")
    parser.add_argument("--split", default="valid")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--nprobe", type=int, help="default: the run's")
    parser.add_argument("--queries", type=int, default=20_000, help="tokens that distlm evaluates (0: all)")
    parser.add_argument("--sample", type=int, default=1024, help="tokens that the original evaluates")
    parser.add_argument("--batch", type=int, default=256, help="tokens of a batch of the original")
    parser.add_argument("--tune-tokens", type=int, default=217_646, help="tokens of the grid (0: no tuning)")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="with --quick: keep the small run in this folder")
    parser.add_threads()
    parser.add_out()
    parser.set_defaults(index=None)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        options.run_dir = options.run_dir or finished_run(options.keep or Path(folder))
        torch.set_num_threads(use_threads(options.threads))
        report(measure(from_run(options), options), options)


@dataclass(frozen=True)
class Bench:
    """What every turn is given."""

    case: Case
    search: Callable[[np.ndarray], np.ndarray]
    """distlm's: queries fp16 [q, D] → ids of neighbours [q, k]."""
    plain: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    """faiss's own, of the same file: queries → distances as the index gives them, and ids."""
    values: np.ndarray
    """Of the whole store."""
    log_lm: np.ndarray
    """ln p of the language model for each token."""
    batches: list[np.ndarray]
    """Places of the tokens of each batch of the original."""

    @property
    def sample(self) -> np.ndarray:
        """Places of all tokens that the original evaluates."""
        return np.concatenate(self.batches)


class Turn(NamedTuple):
    """Every way once."""

    spent: dict[str, tuple[Seconds, int]]
    """Of each way, and for how many tokens."""
    perplexity: dict[str, float]
    """Of the same tokens, by each way."""
    kept: "list[Kept]"


def prepare(case: Case, options: Options) -> Bench:
    """The index by faiss alone, values, and batches of --sample tokens; the keys are in memory then."""
    count = len(case.queries)
    neighbours = Neighbours.open(RunDir(options.run_dir).neighbours(options.split))
    read_all(case.store)
    values = np.concatenate([np.asarray(case.store.values(shard.index)) for shard in case.store.shards])
    return Bench(
        case, next(iter(case.searches.values())), faiss_search(options.run_dir, case), values,
        neighbours.log_probs()[:count], spread_batches(count, options.sample, options.batch),
    )  # fmt: skip


def turn(bench: Bench) -> Turn:
    """The original's ways, then distlm's."""
    case, count, sample = bench.case, len(bench.case.queries), bench.sample
    note(f"the original on {len(sample)} tokens")
    theirs, clocks = original(bench)
    spent = {name: (both, len(sample)) for name, both in clocks.items()}
    note(f"distlm on {count} tokens")
    start = clock()
    ids, near = np.empty((count, case.k), np.int64), np.empty((count, case.k), np.int32)
    for first in range(0, count, UNIT):
        unit = slice(first, first + UNIT)
        ids[unit] = bench.search(case.queries[unit])
        near[unit] = np.where(ids[unit] < 0, -1, bench.values[ids[unit]])
    spent["distlm search"] = clock() - start, count
    kept = [Kept(unit, *found) for unit, *found in sorted_units(case, ids, near)]
    ours = score(case, kept)
    spent["distlm first"] = clock() - start, count
    start = clock()
    score(case, kept)
    spent["distlm further"] = clock() - start, count
    figures = {name: perplexity(bench.log_lm[sample], scores) for name, scores in theirs.items()}
    figures["distlm"] = perplexity(bench.log_lm[sample], ours[sample])
    for value in figures.values():
        assert abs(value / figures["distlm"] - 1) < 1e-6, f"perplexities differ: {figures}"
    return Turn(spent, figures, kept)


def measure(case: Case, options: Options) -> dict[str, Any]:
    """Rates of both, their ratios and perplexities, and the seconds of tuning."""
    bench, best = prepare(case, options), Best()
    for number in range(options.repeat):
        note(f"turn {number}")
        found = turn(bench)
        for name, (both, tokens) in found.spent.items():
            best.keep(name, both, tokens)
    return {
        **case.about, "k": case.k, "queries": len(case.queries), "sample": len(bench.sample), "batch": options.batch,
        "threads": torch.get_num_threads(), "perplexity": found.perplexity,
        "tokens_per_s": {name: round(1 / seconds, 1) for name, seconds in best.wall.items()},
        "core_us_per_token": {name: micro(seconds) for name, seconds in best.processor.items()},
        "ratios": {"time": ratios(best.wall), "processor time": ratios(best.processor)},
        "tuning": tune(case, found.kept, options) if options.tune_tokens else None,
    }  # fmt: skip


def ratios(times: dict[str, float]) -> dict[str, float]:
    """How many times faster distlm is than each way of the original."""
    return {
        f"{way}{search} / {mine}": round(times[way + search] / times[mine], 2)
        for way in WAYS for search in ("", OURS) for mine in ("distlm first", "distlm further")
    }  # fmt: skip


def spread_batches(tokens: int, sample: int, batch: int) -> list[np.ndarray]:
    """Places of the tokens of each batch: about `sample` tokens in whole batches, spread evenly over `tokens`."""
    batch = min(batch, tokens)
    wanted = max(1, min(sample, tokens) // batch)
    starts = np.unique(np.linspace(0, tokens - batch, wanted).astype(int) // batch * batch)
    return [np.arange(start, start + batch) for start in starts]


def faiss_search(run_dir: Path, case: Case) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Search of the index file by faiss alone, in memory."""
    index = faiss.read_index(str(IndexFolder(RunDir(run_dir).index).merged))
    faiss.extract_index_ivf(index).nprobe = case.nprobe
    faiss.omp_set_num_threads(torch.get_num_threads())
    return lambda queries: index.search(queries.astype(np.float32), case.k)


def original(bench: Bench) -> tuple[dict[str, np.ndarray], dict[str, Seconds]]:
    """log p_kNN of the batches' tokens with each way of aggregating, and the clocks that each has used in all.

    The neighbours that are scored are those of distlm's search, so that all score the same.
    """
    case = bench.case
    keys, firsts = memory_maps(case)
    shared, searches = np.zeros(2), {"": np.zeros(2), OURS: np.zeros(2)}
    spent = {way: np.zeros(2) for way in WAYS}
    scores: dict[str, list[np.ndarray]] = {name: [] for name in spent}
    for places in bench.batches:
        start = clock()
        bench.plain(case.queries[places])
        searches[""] += clock() - start
        start = clock()
        ids = bench.search(case.queries[places])
        searches[OURS] += clock() - start
        start = clock()
        present = np.maximum(ids, 0)
        near = torch.from_numpy(read_keys(keys, firsts, present)).float()
        queries = torch.from_numpy(case.queries[places].astype(np.float32))
        distances = torch.sum((queries[:, None] - near) ** 2, dim=2)
        distances[torch.from_numpy(ids < 0)] = float("inf")
        log_weights = torch.log_softmax(-distances, dim=1)
        words, targets = torch.from_numpy(bench.values[present]), torch.from_numpy(case.targets[places])
        shared += clock() - start
        for name, aggregate in zip(WAYS, (by_mask, by_vocabulary), strict=True):
            start = clock()
            scores[name].append(aggregate(log_weights, words, targets, case.store.vocabulary))
            spent[name] += clock() - start
    joined = {name: np.concatenate(parts) for name, parts in scores.items()}
    return joined, {way + name: spent[way] + shared + took for way in WAYS for name, took in searches.items()}


def by_mask(log_weights: torch.Tensor, words: torch.Tensor, targets: torch.Tensor, _vocabulary: int) -> np.ndarray:
    """log p of the targets: logsumexp of the neighbours whose value it is, the others at −10000."""
    misses = torch.where(words == targets[:, None], 0.0, -10000.0)
    return torch.logsumexp(log_weights + misses, dim=1).double().numpy()


def by_vocabulary(log_weights: torch.Tensor, words: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> np.ndarray:
    """log p of the targets from probabilities of all words [tokens, vocabulary], floored at e^−10000 as by_mask."""
    dense = torch.zeros(len(words), vocabulary)
    dense.scatter_add_(1, words.long(), log_weights.exp())
    every = dense.log().clamp_(min=-10000.0)
    return every.gather(1, targets.long()[:, None])[:, 0].double().numpy()


def memory_maps(case: Case) -> tuple[list[np.memmap], np.ndarray]:
    """The keys of each shard, and its first row."""
    shards = case.store.shards
    return [case.store.keys(shard.index) for shard in shards], np.array([shard.first_row for shard in shards])


def read_keys(keys: Sequence[np.memmap], firsts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Keys of `rows` [q, k] from the memory maps: [q, k, D] in their own dtype."""
    gathered = np.empty((*rows.shape, keys[0].shape[1]), keys[0].dtype)
    owner = np.searchsorted(firsts, rows, side="right") - 1
    for number, part in enumerate(keys):
        here = owner == number
        gathered[here] = part[rows[here] - firsts[number]]
    return gathered


class Kept(NamedTuple):
    """What distlm keeps of a unit of tokens."""

    unit: slice
    distances: np.ndarray
    values: np.ndarray


def score(case: Case, kept: Sequence[Kept]) -> np.ndarray:
    """log p_kNN of every token from what was kept: fp64 [Q]."""
    parts = [knn_log_probs(part.distances, part.values, case.targets[part.unit], 1.0)[0] for part in kept]
    return np.concatenate(parts)


def perplexity(log_lm: np.ndarray, log_knn: np.ndarray) -> float:
    return math.exp(mean_loss(interpolate(log_lm, log_knn, WEIGHT)))


def tune(case: Case, kept: Sequence[Kept], options: Options) -> dict[str, Any]:
    """Seconds of choosing λ, T and k over the whole grid, from memory as a second start would find the files."""
    tokens, neighbours = options.tune_tokens, Neighbours.open(RunDir(options.run_dir).neighbours(options.split))
    units, log_lm = [], neighbours.log_probs()
    for part in kept:
        keys, ids = np.empty((len(part.values), 0), np.float16), np.empty((len(part.values), 0), np.int64)
        units.append(Unit(keys, case.targets[part.unit], log_lm[part.unit], ids, part.distances, part.values))

    class Repeated(Neighbours):
        @property
        def tokens(self) -> int:
            return sum(len(unit) for unit in self.units())

        def units(self) -> Iterator[Unit]:
            left = tokens
            for unit in itertools.cycle(units):
                if left <= 0:
                    return
                yield unit if len(unit) <= left else Unit(*(getattr(unit, name)[:left] for name in ARRAYS))
                left -= len(unit)

    ks = sorted({max(1, case.k >> shift) for shift in range(6)})
    lambdas, temperatures = [i / 10 for i in range(10)], [0.25 * 2.0**i for i in range(10)]
    grid = [f"knn.k={case.k}", f"knn.ks={ks}", f"knn.lambdas={lambdas}", f"knn.temperatures={temperatures}"]
    knn = load_config("demo", grid).knn
    note(f"tuning on {tokens} tokens")
    start = time.perf_counter()
    losses = grid_losses(Repeated(neighbours.folder, neighbours.manifest), knn)
    seconds = time.perf_counter() - start
    return {"tokens": tokens, "points": losses.size, "seconds": round(seconds, 2), "best_nats": float(losses.min())}


if __name__ == "__main__":
    main()
