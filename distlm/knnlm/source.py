"""What a search reads: token files, model, datastore and index, opened together and checked against each other."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.search import SearchIndex, brute_search, open_index
from distlm.knnlm.forward import Forward, open_forward
from distlm.knnlm.rescore import SortedPairs, sort_pairs
from distlm.models.card import model_fingerprint
from distlm.runtime.stage import Stage

SELF_TEST_KEYS = 256
LEAST_SELF_FOUND = 0.1
"""A search that finds fewer of the store's own keys than this is broken; rows at random find about k / N."""


@dataclass(frozen=True)
class Source(Forward):
    """Opened and checked inputs of a search."""

    datastore: Datastore
    index: SearchIndex | None
    """None: brute force."""

    @property
    def key_dtype(self) -> np.dtype[np.floating]:
        """Type of keys and queries on disk."""
        return self.datastore.key_dtype

    @property
    def rescores(self) -> bool:
        """Distances are to be recomputed from the true keys after the search."""
        return self.dot or (self.index is not None and self.knn.distances == "exact")

    @property
    def dot(self) -> bool:
        """They are to be dot products."""
        return self.knn.similarity == "dot"

    def search(
        self, queries: npt.NDArray[np.floating], k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Neighbours of queries [Q, D]: ids int64 [Q, k] (−1: none), squared L2 fp32 [Q, k]."""
        single = np.ascontiguousarray(queries, dtype=np.float32)
        if self.index is None:
            ids, distances = brute_search(self.datastore, single, k)
        else:
            ids, distances = self.index.search(single, k, self.knn.nprobe)
        if int(ids.max(initial=-1)) >= self.datastore.rows:
            raise DistlmError(
                f"search returned row {int(ids.max())}, the store has {self.datastore.rows}: the index is not of this "
                "store; build it again"
            )
        return ids, distances

    def values(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The stored target of each neighbour: int32, the shape of `ids` [q, k]; −1 where the id is −1."""
        values = np.full(ids.size, -1, np.int32)
        pairs: SortedPairs = sort_pairs(ids)
        for shard in self.datastore.shards:
            low, high = pairs.bounds([shard.first_row, shard.first_row + shard.rows])
            if high > low:
                stored = self.datastore.values(shard.index)
                values[pairs.places[low:high]] = stored[pairs.rows[low:high] - shard.first_row]
        return values.reshape(ids.shape)


def open_source(stage: Stage) -> Source:
    """Open and check everything a search needs. Raises DistlmError naming the two things that do not fit."""
    knn, run = stage.config.knn, stage.run
    datastore = Datastore.open(run.datastore)
    datastore.require_model(model_fingerprint(run.model_checkpoint(stage.config)))
    forward = open_forward(stage)
    datastore.require_dictionary(forward.tokens.dictionary.hash)
    index = open_index(run.index, datastore) if knn.search == "index" else None
    return Source(knn, forward.tokens, forward.model, forward.model_fingerprint, datastore, index)


def self_test(source: Source) -> dict[str, Any]:
    """Search for stored keys: how many find their own row.

    Returns keys (sampled), k, first (share whose nearest neighbour is the own row) and found (share with the own row
    among the k). Ties of equal keys count as misses. Raises DistlmError below LEAST_SELF_FOUND.
    """
    store = source.datastore
    random = np.random.Generator(np.random.Philox(key=[0, store.rows]))
    rows = np.sort(random.choice(store.rows, min(SELF_TEST_KEYS, store.rows), replace=False))
    picked = []
    for shard in store.shards:
        inside = rows[(rows >= shard.first_row) & (rows < shard.first_row + shard.rows)]
        picked.append(np.asarray(store.keys(shard.index)[inside - shard.first_row]))
    k = min(source.knn.k, store.rows)
    own = source.search(np.concatenate(picked), k)[0] == rows[:, None]
    result = {
        "keys": len(rows),
        "k": k,
        "first": float(own[:, 0].mean()),
        "found": float(own.any(axis=1).mean()),
    }
    if result["found"] < LEAST_SELF_FOUND:
        raise DistlmError(
            f"{store.folder}: self-test failed: of {len(rows)} stored keys {result['found']:.1%} found their own row "
            f"among {k} neighbours; rows and index do not belong together, or knn.nprobe={source.knn.nprobe} is far "
            "too small: build the index again"
        )
    return result
