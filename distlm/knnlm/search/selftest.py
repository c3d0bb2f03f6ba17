"""Self-test of retrieval: what must hold before a perplexity is worth anything; a failure stops the stage.

Before a search, sampled keys of the store are looked up. Every search must return row numbers of the store (−1 for
none, with an infinite distance, last), each once, nearest first, and must have searched as many lists as was asked.
How many keys find their own row among the k is compared with how many should: a key lies in the first list that it
probes, so it must be found, or a copy of it (a text may repeat itself), unless k other keys are nearer to it than its
own encoding is. That distance, of a key to
its own encoding, is computed from the template alone; a coarse quantiser lowers the expectation, rows that are not
those of their keys do not. Before an evaluation the kept neighbours of sampled tokens are checked in the same way, and
their values against the store's.

`knn.self_test=false` (`--no-self-test`) leaves both out; the results then say so.
"""

import numpy as np
import numpy.typing as npt

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.keys import gather_keys
from distlm.index.pairs import stored_values
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.records import SelfTest
from distlm.knnlm.search.source import Source

KEYS = 256
"""Stored keys that are looked up."""
QUERIES = 1024
"""Evaluated tokens of a split whose kept neighbours are checked."""
LEAST_OF_EXPECTED = 0.95
"""Least share of the expected keys that must be found. Not 1: distances of 8-bit look-up tables are rounded."""
MARGIN = 0.95
"""A key is expected to be found when its own encoding is nearer than this share of the k-th distance."""
COPY = 1e-5
"""Keys nearer to each other than this share of their squared length are copies: rounding to float16 moves them by less
than a tenth of it."""
COPIES = 16
"""First neighbours among which a copy is looked for; their keys are read."""
LEAST_FOUND = 0.1
"""An index that finds fewer of the store's own keys than this is useless, expected or not; random rows find k / N."""


def self_test(source: Source) -> SelfTest:
    """Look stored keys up and stop when they are not found, or when the search is broken in another way.

    With knn.self_test=false nothing is looked up, and the figures say so. Raises DistlmError with the reason.
    """
    if not source.knn.self_test:
        return SelfTest(run=False)
    store, index = source.datastore, source.index
    random = np.random.Generator(np.random.Philox(key=[0, store.rows]))
    rows = np.sort(random.choice(store.rows, min(KEYS, store.rows), replace=False))
    keys = gather_keys(store, rows)
    k = min(source.knn.k, store.rows)
    ids, distances = source.search(keys, k)
    head = f"{store.folder}: self-test failed"
    if problem := search_problem(ids, distances, store.rows):
        again = "" if index is None else "build the index again, or "
        raise DistlmError(f"{head}: {problem}; {again}search with another version of faiss")
    if index is not None and index.nprobe != min(source.knn.nprobe, index.nlist):
        raise DistlmError(f"{head}: knn.nprobe={source.knn.nprobe}, and {index.nprobe} lists were searched")
    own = ids == rows[:, None]
    encoded = np.zeros(len(rows)) if index is None else index.encoded_distances(keys)
    expected = float(np.mean(encoded < MARGIN * distances[:, -1]))
    found = float((own.any(axis=1) | _copies(store, keys, ids, own)).mean())
    if found < max(LEAST_FOUND, LEAST_OF_EXPECTED * expected):
        why = (
            "the keys were changed while they were searched, or this faiss does not work: `distlm datastore verify`"
            if index is None
            else "rows and index do not belong together, or its codes are far too coarse: build the index again"
        )
        raise DistlmError(
            f"{head}: of {len(rows)} stored keys {found:.1%} found their own row among {k} neighbours, {expected:.1%} "
            f"should; {why} (knn.self_test=false searches in spite of it, and the results will say so)"
        )
    return SelfTest(
        run=True, keys=len(rows), k=k, nprobe=None if index is None else index.nprobe, expected=expected, found=found,
        first=float(own[:, 0].mean()),
    )  # fmt: skip


def _copies(
    store: Datastore, keys: npt.NDArray[np.float32], ids: npt.NDArray[np.int64], own: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Which of the keys [n, D] have a copy among the first of their neighbours `ids` [n, k]: bool [n]. Not asked of
    those that have found their own row, by `own` [n, k]."""
    found = np.zeros(len(keys), bool)
    for number in np.flatnonzero(~own.any(axis=1)):
        near = ids[number, :COPIES]
        others = gather_keys(store, near[near >= 0])
        found[number] = (((others - keys[number]) ** 2).sum(axis=1) <= COPY * (keys[number] ** 2).sum()).any()
    return found


def check_kept(neighbours: Neighbours, store: Datastore) -> int:
    """Check the kept neighbours of sampled tokens of a split; the number of tokens.

    Raises DistlmError naming the unit when ids, order or values are not what a search of `store` can have given.
    """
    checked = 0
    for number, unit in enumerate(neighbours.units()):
        wanted = max(1, -(-QUERIES * len(unit) // neighbours.tokens))
        places = np.unique(np.linspace(0, len(unit) - 1, wanted).astype(int))
        ids, distances, values = (np.asarray(array[places]) for array in (unit.ids, unit.distances, unit.values))
        problem = search_problem(ids, distances, store.rows)
        if problem is None and not np.array_equal(values, stored_values(store, ids)):
            problem = "values are not those of the rows in the store"
        if problem:
            raise DistlmError(
                f"{neighbours.folder}, unit {number}: self-test failed: {problem}; remove {neighbours.folder} and run "
                "`distlm knn search` again (knn.self_test=false evaluates in spite of it, and the results will say so)"
            )
        checked += len(places)
    return checked


def search_problem(ids: npt.NDArray[np.int64], distances: npt.NDArray[np.float32], rows: int) -> str | None:
    """What is wrong with the neighbours [q, k] of a store of `rows` rows, or None."""
    absent = ids < 0
    if (ids < -1).any() or (ids >= rows).any():
        wrong = ids[(ids < -1) | (ids >= rows)]
        return f"row {int(wrong[0])} was found, the store has rows 0 to {rows - 1}"
    if np.isnan(distances).any() or not np.array_equal(absent, np.isposinf(distances)):
        return "a distance is undefined, or infinite beside a row, or finite beside none"
    if not (distances[:, 1:] >= distances[:, :-1]).all():
        return "neighbours are not sorted by rising distance"
    ordered = np.sort(ids, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        return "a row was found twice for one query"
    return None
