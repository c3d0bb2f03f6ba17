"""Measures factories on a sample of a store's keys against exact neighbours, and names one for a budget."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError, UsageError
from distlm.index.build.encode import Encoder
from distlm.index.factory import Factory, fit_factory
from distlm.index.faiss_module import require_faiss
from distlm.index.layout import Array, deserialise
from distlm.index.search.searcher import SearchIndex, Shape
from distlm.index.train.sample import StoreSample
from distlm.index.train.template import train_template
from distlm.runtime.ranks.cores import usable_cores

PROBES = (8, 32, 128)


@dataclass(frozen=True)
class Sample:
    """Keys of a store, split into those that are indexed and those that are looked for."""

    keys: Array
    """fp32 [n, D]."""
    rows: Array
    """Row in the store of each key, int64 [n]."""
    queries: Array
    """fp32 [q, D]; no row of them is among the keys."""
    exact: Array
    """The k exact nearest keys of each query, as places in `keys`, int64 [q, k]."""
    share: float
    """Keys over the store's rows."""


@dataclass(frozen=True)
class Measured:
    """One factory at one nprobe."""

    factory: str
    nprobe: int
    key_bytes: int
    recall: float
    """Share of the k exact nearest that are among the k found."""
    query_ms: float
    """Milliseconds per query, in one batch of all queries, on this process's threads."""
    add_keys_s: float
    train_s: float
    perplexity: float | None = None
    """Of the interpolated model, where neighbours of a split were kept; see distlm/knnlm/tune/choose.py."""


@dataclass(frozen=True)
class Budget:
    """What the pick may cost; 0: no limit."""

    key_bytes: float = 0
    query_ms: float = 0
    recall: float = 0
    """At least."""

    def allows(self, one: Measured) -> bool:
        """Whether a measured factory stays within every limit."""
        return (
            (not self.key_bytes or one.key_bytes <= self.key_bytes)
            and (not self.query_ms or one.query_ms <= self.query_ms)
            and one.recall >= self.recall
        )


def default_factories(width: int, nlist: int) -> list[str]:
    """Factories worth comparing for keys of `width` values: the papers' PQ, the same bytes as 4-bit codes, behind an
    OPQ and a PCA, RaBitQ, and 8-bit scalars whole and behind a PCA."""
    coarse, bytes_ = f"IVF{nlist}", max(1, width // 16)
    small = max(4, width // 4)
    return [
        f"{coarse},PQ{bytes_}", f"{coarse},PQ{2 * bytes_}x4", f"OPQ{bytes_},{coarse},PQ{bytes_}",
        f"PCA{small},{coarse},PQ{min(bytes_, small)}", f"PCA{small},{coarse},PQ{min(2 * bytes_, small)}x4",
        f"{coarse},RaBitQ", f"PCA{small},{coarse},SQ8", f"{coarse},SQ8",
    ]  # fmt: skip


def draw_sample(datastore: Datastore, count: int, queries: int, k: int, seed: int) -> Sample:
    """`count` keys and `queries` others, seeded and spread over all shards, with the exact neighbours of the latter.

    Memory: (count + queries) × D × 4 bytes. Raises DistlmError for NaN or infinite keys and a store without enough.
    """
    total = min(count + queries, datastore.rows)
    if total - queries < max(k, 2):
        raise DistlmError(
            f"{datastore.folder}: {datastore.rows} rows are too few for {queries} queries and k={k}; ask for fewer "
            "queries or neighbours"
        )
    drawn = StoreSample(datastore, total, seed)
    rows, keys = drawn.numbers, drawn.read(np.arange(total)).astype(np.float32)
    random = np.random.Generator(np.random.Philox(key=np.array([seed, total], np.uint64)))
    asked = np.zeros(total, bool)
    asked[random.choice(total, queries, replace=False)] = True
    indexed, looked_for = keys[~asked], keys[asked]
    return Sample(
        indexed, rows[~asked], looked_for, exact_places(indexed, looked_for, k), len(indexed) / datastore.rows
    )


def exact_places(keys: Array, queries: Array, k: int) -> Array:
    """Places in `keys` fp32 [n, D] of the k nearest of each of `queries` fp32 [q, D]: int64 [q, k]."""
    found: Array = require_faiss().knn(queries, keys, k)[1]
    return found


def measure(
    asked: str, sample: Sample, k: int, seed: int, probes: Sequence[int] = PROBES
) -> tuple[Factory, SearchIndex, list[Measured]]:
    """Train, add and search one factory on the sample.

    It keeps its number of lists as long as there are keys to train them, so that nprobe reaches the same share of the
    keys as in the whole store. Raises DistlmError for a factory that cannot be built.
    """
    count, width = sample.keys.shape
    factory = fit_factory(asked, width, count, count)
    start = time.perf_counter()
    template = train_template(factory, sample.keys[: factory.sample], seed, usable_cores())
    trained = time.perf_counter()
    index = deserialise(template)
    with Encoder(index, keys=count) as encoder:
        for first in range(0, count, encoder.batch):
            batch = sample.keys[first : first + encoder.batch]
            encoder.add(batch, np.arange(first, first + len(batch), dtype=np.int64))
    added = time.perf_counter()
    searched = SearchIndex(with_table(index), Shape(count, width, factory.nlist), Path(asked))
    results = []
    for probe in sorted({min(probe, factory.nlist) for probe in probes}):
        began = time.perf_counter()
        ids, _ = searched.search(sample.queries, k, probe)
        seconds = time.perf_counter() - began
        results.append(
            Measured(
                asked, probe, factory.key_bytes, recall(ids, sample.exact), 1000 * seconds / len(ids),
                count / (added - trained), trained - start,
            )
        )  # fmt: skip
    return factory, searched, results


def recall(ids: Array, exact: Array) -> float:
    """Share of the exact ids [q, k] that are in the same row of `ids` [q, k']; −1 (none) counts in neither."""
    hits = sum(len(np.intersect1d(row, true[true >= 0])) for row, true in zip(ids, exact, strict=True))
    return hits / max(1, int((exact >= 0).sum()))


def with_table(index: object) -> object:
    """The same index with the table that searching an IVFPQ uses."""
    faiss = require_faiss()
    return faiss.deserialize_index(faiss.serialize_index(index))


def choose(
    sample: Sample, factories: Sequence[str], k: int, seed: int, tick: Callable[[str], None],
    perplexity: Callable[[SearchIndex, int], float] | None = None,
) -> tuple[list[Measured], list[str]]:  # fmt: skip
    """Measure every factory; those that cannot be built are left out, with the reason among the messages."""
    if not factories:
        raise UsageError("index tune --factories: name at least one, e.g. IVF4096,PQ64")
    measured, messages = [], []
    for asked in factories:
        tick(asked)
        try:
            _, index, results = measure(asked, sample, k, seed)
        except DistlmError as error:
            messages.append(str(error))
            continue
        if perplexity is not None:
            results = [replace(one, perplexity=perplexity(index, one.nprobe)) for one in results]
        measured += results
    if not measured:
        raise DistlmError(f"none of the factories can be built here: {'; '.join(messages)}")
    return measured, messages


def pareto(measured: Sequence[Measured]) -> list[Measured]:
    """Those that no other beats in bytes, time and recall together, by bytes and then time."""

    def beats(other: Measured, one: Measured) -> bool:
        no_worse = other.key_bytes <= one.key_bytes and other.query_ms <= one.query_ms and other.recall >= one.recall
        return no_worse and (other.key_bytes, other.query_ms, other.recall) != (one.key_bytes, one.query_ms, one.recall)

    front = [one for one in measured if not any(beats(other, one) for other in measured)]
    return sorted(front, key=lambda one: (one.key_bytes, one.query_ms))


def pick(measured: Sequence[Measured], budget: Budget) -> Measured | None:
    """The most recall within the budget, of equals the fastest, then the smallest.

    With a wanted recall any of that recall will do, and the fastest is taken. None when nothing fits.
    """
    fitting = [one for one in measured if budget.allows(one)]
    if budget.recall:
        return min(fitting, key=lambda one: (one.query_ms, one.key_bytes), default=None)
    return min(fitting, key=lambda one: (-one.recall, one.query_ms, one.key_bytes), default=None)
