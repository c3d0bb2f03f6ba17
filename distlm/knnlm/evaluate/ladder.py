"""The exactness ladder: what approximation costs, on a sample of evaluated tokens.

  exact      every key of the store is compared: the oracle
  rescored   the index's neighbours, with squared L2 over the true keys
  quantised  the index's neighbours and distances as they are

Each with the same frozen λ, temperature and k. The sample is spread evenly over the split; its perplexities are not
those of the whole split. Memory: that of brute_search and exact_distances, which is bounded.
"""

import numpy as np
import numpy.typing as npt

from distlm.datastore.reader import Datastore
from distlm.index import SearchIndex, brute_search, exact_distances
from distlm.index.choose.measure import recall
from distlm.index.pairs import stored_values
from distlm.knnlm.evaluate.parts import Frozen
from distlm.knnlm.evaluate.records import Ladder, Rung
from distlm.knnlm.scoring import interpolate, knn_log_probs
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.rescore import nearest_first
from distlm.knnlm.tune.adaptive import figures
from distlm.runtime.files import json_hash
from distlm.runtime.progress import say

Ids = npt.NDArray[np.int64]
RUNGS = ("exact", "rescored", "quantised")


def ladder_key(neighbours: Neighbours, frozen: Frozen, sample: int) -> str:
    """Hash of all that the ladder depends on; the neighbours' fingerprint is also of store, index and model."""
    return json_hash([neighbours.fingerprint, frozen.weight, frozen.temperature, frozen.k, sample])


def exactness_ladder(
    store: Datastore, index: SearchIndex, neighbours: Neighbours, frozen: Frozen, sample: int
) -> Ladder:
    """Score `sample` tokens of a split (at most all) on every rung; see the module's docstring."""
    queries, targets, log_lm = neighbours.sample(sample)
    asked, nprobe = neighbours.searched or neighbours.k, neighbours.manifest.nprobe
    assert nprobe is not None, "neighbours by brute force have no ladder"
    say(f"knn evaluate: exactness ladder: {len(queries)} queries against all {store.rows:,} keys (knn.ladder_sample)")
    found, encoded = index.search(queries, asked, nprobe)
    rungs = {
        "exact": brute_search(store, queries, frozen.k),
        "rescored": (found, exact_distances(store, queries, found)),
        "quantised": (found, encoded),
    }
    made: dict[str, Rung] = {}
    nearest: dict[str, Ids] = {}
    for name in RUNGS:
        ids, distances = rungs[name]
        ids, distances, values = nearest_first(ids, distances, stored_values(store, ids))
        nearest[name] = ids[:, : frozen.k]
        log_knn = knn_log_probs(distances, values, targets, frozen.temperature, [frozen.k])[0]
        mixed = figures(interpolate(log_lm, log_knn, frozen.weight))
        made[name] = Rung(mixed.loss_nats, mixed.perplexity, recall(nearest[name], nearest["exact"]))
    return Ladder(
        split=neighbours.manifest.split, queries=len(queries), k=frozen.k, searched=asked, nprobe=nprobe,
        lm=figures(log_lm), **made, key=ladder_key(neighbours, frozen, sample),
    )  # fmt: skip
