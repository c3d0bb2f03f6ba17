"""The exactness ladder: what approximation costs, on a sample of evaluated tokens.

  exact      every key of the store is compared: the oracle
  rescored   the index's neighbours, with squared L2 over the true keys
  quantised  the index's neighbours and distances as they are

Each with the same frozen λ, temperature and k. The sample is spread evenly over the split; its perplexities are not
those of the whole split. Beside them: what exact distances would have found among k, 2k and 4k candidates; what the
searches for these take is said, and not kept, since it is never twice the same. Memory: that of brute_search and
exact_distances, which is bounded.
"""

import time

import numpy as np
import numpy.typing as npt

from distlm.datastore.reader import Datastore
from distlm.index import SearchIndex, brute_search, exact_distances
from distlm.index.choose.measure import recall
from distlm.index.pairs import stored_values
from distlm.knnlm.evaluate.parts import Frozen
from distlm.knnlm.evaluate.records import CandidatesRung, Ladder, Rung
from distlm.knnlm.scoring import interpolate, knn_log_probs
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.rescore import nearest_first
from distlm.knnlm.tune.adaptive import figures
from distlm.runtime.files import json_hash
from distlm.runtime.progress import say

Ids = npt.NDArray[np.int64]
Floats32 = npt.NDArray[np.float32]
TIMES_K = (1, 2, 4)
"""Candidates that are compared, over k."""


def ladder_key(neighbours: Neighbours, frozen: Frozen, sample: int) -> str:
    """Hash of all that the ladder depends on; the neighbours' fingerprint is also of store, index and model."""
    return json_hash([neighbours.fingerprint, frozen.weight, frozen.temperature, frozen.k, sample])


def exactness_ladder(
    store: Datastore, index: SearchIndex, neighbours: Neighbours, frozen: Frozen, sample: int
) -> Ladder:
    """Score `sample` tokens of a split (at most all) on every rung; see the module's docstring."""
    queries, targets, log_lm = neighbours.sample(sample)
    manifest = neighbours.manifest
    asked, nprobe = max(manifest.candidates or 0, neighbours.searched, neighbours.k), manifest.nprobe
    assert nprobe is not None, "neighbours by brute force have no ladder"
    say(f"knn evaluate: exactness ladder: {len(queries)} queries against all {store.rows:,} keys (knn.ladder_sample)")
    counts = sorted({asked, *(min(times * neighbours.k, store.rows) for times in TIMES_K)})
    # The first candidates of a search for more are those of a search for fewer.
    found, encoded = index.search(queries, counts[-1], nprobe)
    true = exact_distances(store, queries, found)
    best, _ = brute = brute_search(store, queries, frozen.k)

    def rung(ids: Ids, distances: Floats32) -> Rung:
        ids, distances, values = nearest_first(ids, distances, stored_values(store, ids))
        log_knn = knn_log_probs(distances, values, targets, frozen.temperature, [frozen.k])[0]
        mixed = figures(interpolate(log_lm, log_knn, frozen.weight))
        return Rung(mixed.loss_nats, mixed.perplexity, recall(ids[:, : frozen.k], best))

    for count in counts:
        start = time.perf_counter()
        index.search(queries, count, nprobe)
        took = 1000 * (time.perf_counter() - start) / len(queries)
        say(f"knn evaluate: exactness ladder: {count} candidates: {took:.2f} ms a query in the index")
    among: dict[int, Rung] = {count: rung(found[:, :count], true[:, :count]) for count in counts}
    return Ladder(
        split=neighbours.manifest.split, queries=len(queries), k=frozen.k, searched=asked, nprobe=nprobe,
        lm=figures(log_lm), exact=rung(*brute), rescored=among[asked],
        quantised=rung(found[:, :asked], encoded[:, :asked]), key=ladder_key(neighbours, frozen, sample),
        candidates=[
            CandidatesRung(count, one.loss_nats, one.perplexity, one.recall) for count, one in among.items()
        ],
    )  # fmt: skip
