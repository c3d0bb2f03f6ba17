"""Measures factories on samples of a store's keys against exact neighbours, and names one for a budget."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec import structs

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.build.encode import Encoder
from distlm.index.choose.extrapolate import recall_at, time_at
from distlm.index.choose.proposals import LEAST_KEYS_PER_LIST, Proposal
from distlm.index.factory import Factory, fit_factory
from distlm.index.faiss_module import require_faiss
from distlm.index.layout import Array, deserialise
from distlm.index.records import Candidate
from distlm.index.search.candidates import MORE
from distlm.index.search.searcher import SearchIndex, Shape, exact_places_distances
from distlm.index.train.sample import StoreSample, some_of
from distlm.index.train.template import Known, train_template
from distlm.runtime.ranks.cores import usable_cores

PROBES = (8, 32, 128)
TURNS = 2
"""Searches of which the faster counts: what else runs on the machine only adds."""
MOST_READ = 4
"""Recall says how it will fall where at most this part of the lists is read: 1 / 4."""
RESCORED = 64
"""Queries whose candidates are given exact distances, to see how long that takes."""
_SUBSET, _TRAINED = 5, 6
"""Draws of a smaller sample, and of what trains a factory (sample.some_of)."""


KnownOf = dict[int, Known]
"""Keys of a sample → centroids that were trained on it. Another sample has another transform before them."""


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

    def part(self, count: int, k: int, seed: int) -> "Sample":
        """`count` of the keys with the same queries, and their k exact nearest."""
        places = some_of(len(self.keys), count, seed, _SUBSET)
        keys = self.keys[places]
        share = self.share * len(keys) / len(self.keys)
        return Sample(keys, self.rows[places], self.queries, exact_places(keys, self.queries, k), share)


@dataclass(frozen=True)
class Budget:
    """What the pick may cost in the whole store; 0: no limit."""

    key_bytes: float = 0
    query_ms: float = 0
    recall: float = 0
    """At least."""

    def allows(self, one: Candidate) -> bool:
        """Whether a measured factory stays within every limit."""
        return (
            (not self.key_bytes or one.key_bytes <= self.key_bytes)
            and (not self.query_ms or one.whole_ms <= self.query_ms)
            and one.store_recall >= self.recall
        )


@dataclass(frozen=True)
class Question:
    """What is asked of every factory."""

    rows: int
    """Keys of the store."""
    k: int
    """Neighbours of a query, in the whole store."""
    exact: bool = True
    """Exact distances choose the k among the candidates."""
    seed: int = 1
    probes: Sequence[int] = PROBES


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


@dataclass(frozen=True)
class Built:
    """A factory over a sample."""

    factory: Factory
    index: SearchIndex
    train_s: float
    """Without centroids that were known."""
    add_s: float


def build(asked: str, sample: Sample, seed: int, known: Known | None = None) -> Built:
    """Train a factory and add the sample. Raises DistlmError for one that cannot be built."""
    count, width = sample.keys.shape
    factory = fit_factory(asked, width, count, count, LEAST_KEYS_PER_LIST)
    start = time.perf_counter()
    # Of all shards, as `index train` draws them: the keys stand in the order of the text.
    chosen = sample.keys[some_of(count, factory.sample, seed, _TRAINED)]
    template = train_template(factory, chosen, seed, usable_cores(), known)
    trained = time.perf_counter()
    index = deserialise(template)
    with Encoder(index, keys=count) as encoder:
        for first in range(0, count, encoder.batch):
            batch = sample.keys[first : first + encoder.batch]
            encoder.add(batch, np.arange(first, first + len(batch), dtype=np.int64))
    added = time.perf_counter()
    opened = SearchIndex(with_table(index), Shape(count, width, factory.nlist), Path(asked))
    return Built(factory, opened, trained - start, added - trained)


def measure(
    asked: Proposal, samples: Sequence[Sample], question: Question, known: KnownOf | None = None,
    perplexity: Callable[[SearchIndex, int, int], float] | None = None,
) -> list[Candidate]:  # fmt: skip
    """Build a factory on every sample, smallest first, and search it; the figures are of the largest, and extrapolated
    to the whole store. known: where centroids are kept for the next factory.

    Raises DistlmError for a factory that cannot be built."""
    found: list[dict[tuple[int, int], Candidate]] = []
    for sample in samples:
        count = len(sample.keys)
        built = build(asked.at(count), sample, question.seed, None if known is None else known.setdefault(count, {}))
        last = perplexity if sample is samples[-1] else None
        probes = sorted({min(probe, asked.lists, built.factory.nlist) for probe in question.probes})
        found.append({
            (probe, more): _search(asked, built, sample, question, probe, more, last)
            for probe in probes for more in ((1, MORE) if question.exact else (1,))
        })  # fmt: skip
    return [
        _at_store(asked, [at[place] for at in found if place in at], _falls_as(place, found), question.rows)
        for place in found[-1]
    ]


def _falls_as(place: tuple[int, int], found: Sequence[dict[tuple[int, int], Candidate]]) -> list[Candidate]:
    """Those of another nprobe whose recall falls from sample to sample as that of `place` will, where `place` reads so
    many of the few lists of the smallest sample that recall there says nothing."""
    probe, more = place
    most = next(iter(found[0].values())).lists // MOST_READ
    fewer = [other for other, times in found[0] if times == more and other <= most]
    chosen = (max(fewer), more) if probe > most and fewer else place
    return [at[chosen] for at in found if chosen in at]


def _search(
    asked: Proposal, built: Built, sample: Sample, question: Question, probe: int, more: int,
    perplexity: Callable[[SearchIndex, int, int], float] | None,
) -> Candidate:  # fmt: skip
    index, count, queries = built.index, len(sample.keys), sample.queries
    # As long as in the whole store: what keeping k neighbours costs does not shrink with the sample.
    candidates = min(count, more * question.k)
    seconds = []
    for _ in range(TURNS):
        began = time.perf_counter()
        ids, _ = index.search(queries, candidates, probe)
        seconds.append(time.perf_counter() - began)
    rescored = 0.0
    if question.exact:
        some = slice(0, RESCORED)
        began = time.perf_counter()
        exact_places_distances(sample.keys, queries[some], ids[some])
        rescored = (time.perf_counter() - began) / len(queries[some])
    k = sample.exact.shape[1]
    share = recall(index.search(queries, min(count, more * k), probe)[0], sample.exact)
    query_ms = 1000 * min(seconds) / len(queries)
    return Candidate(
        asked.factory, probe, more * question.k, built.factory.key_bytes, count, built.factory.nlist, share, query_ms,
        share, query_ms, 1000 * rescored, count / built.add_s, built.train_s,
        perplexity(index, probe, more) if perplexity else None,
    )  # fmt: skip


def _at_store(asked: Proposal, measured: Sequence[Candidate], falls: Sequence[Candidate], rows: int) -> Candidate:
    last = measured[-1]
    scanned = [one.nprobe * one.keys / one.lists for one in measured]
    return structs.replace(
        last,
        store_recall=recall_at([one.keys for one in falls], [one.recall for one in falls], rows, last.recall),
        store_ms=time_at(scanned, [one.query_ms for one in measured], last.nprobe * rows / asked.lists),
    )


def recall(ids: Array, exact: Array) -> float:
    """Share of the exact ids [q, k] that are in the same row of `ids` [q, k']; −1 (none) counts in neither."""
    hits = sum(len(np.intersect1d(row, true[true >= 0])) for row, true in zip(ids, exact, strict=True))
    return hits / max(1, int((exact >= 0).sum()))


def with_table(index: object) -> object:
    """The same index with the table that searching an IVFPQ uses."""
    faiss = require_faiss()
    return faiss.deserialize_index(faiss.serialize_index(index))


def measure_all(
    asked: Sequence[Proposal], samples: Sequence[Sample], question: Question, tick: Callable[[str], None],
    perplexity: Callable[[SearchIndex, int, int], float] | None = None, known: KnownOf | None = None,
) -> tuple[list[Candidate], list[str]]:  # fmt: skip
    """Measure every factory; those that cannot be built are left out, with the reason among the messages."""
    measured, messages = [], []
    for one in asked:
        tick(one.factory)
        try:
            measured += measure(one, samples, question, known, perplexity)
        except DistlmError as error:
            messages.append(str(error))
    return measured, messages


def pareto(measured: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in bytes, time and recall together, by bytes and then time."""

    def beats(other: Candidate, one: Candidate) -> bool:
        no_worse = _cost(other)[0] <= _cost(one)[0] and _cost(other)[1] <= _cost(one)[1]
        return no_worse and other.store_recall >= one.store_recall and _cost(other) != _cost(one)

    front = [one for one in measured if not any(beats(other, one) for other in measured)]
    return sorted(front, key=_cost)


def _cost(one: Candidate) -> tuple[int, float, float]:
    return one.key_bytes, one.whole_ms, -one.store_recall


def pick(measured: Sequence[Candidate], budget: Budget) -> Candidate | None:
    """The most recall within the budget, of equals the fastest, then the smallest.

    With a wanted recall any of that recall will do, and the fastest is taken. None when nothing fits.
    """
    fitting = [one for one in measured if budget.allows(one)]
    if budget.recall:
        return min(fitting, key=lambda one: (_cost(one)[1], one.key_bytes), default=None)
    return min(fitting, key=lambda one: (-one.store_recall, _cost(one)[1], one.key_bytes), default=None)
