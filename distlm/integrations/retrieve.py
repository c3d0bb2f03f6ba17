"""Neighbours of hidden states from a store: found, weighed, and each with the token that it stands for."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distlm.datastore.held import HeldDatastore
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.pairs import stored_values
from distlm.index.search.candidates import MORE
from distlm.index.search.searcher import SearchIndex, brute_search, check_queries, exact_distances
from distlm.knnlm.scoring import Floats
from distlm.knnlm.search.rescore import nearest_first

HELD_BYTES = 2 << 30
"""Keys of at most this size are kept as fp32 for searches without an index, so that none converts them anew."""


class Found(NamedTuple):
    """Neighbours of n queries, nearest first; absent ones come last: id and value −1 at distance inf."""

    ids: npt.NDArray[np.int64]
    """int64 [n, k]: rows of the store."""
    distances: npt.NDArray[np.float32]
    """fp32 [n, k]: squared L2."""
    values: npt.NDArray[np.int32]
    """int32 [n, k]: the tokens that followed, ids of the dictionary."""

    def shares(self, temperature: float) -> Floats:
        """Each neighbour's share of p_kNN, softmax(−d / T) (Khandelwal et al. 2020, eq. 2): fp64 [n, k]; 0 where there
        is none."""
        nearest = np.where(self.values[:, :1] >= 0, self.distances[:, :1], np.float32(0))
        weights = np.exp(np.subtract(nearest, self.distances, dtype=np.float64) / temperature)
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        return weights


@dataclass(frozen=True)
class Retriever:
    """A store and how it is searched."""

    datastore: Datastore
    index: SearchIndex | None
    """None: every key is compared."""
    nprobe: int = 32
    """Lists searched per query."""
    exact: bool = True
    """Distances are recomputed from the true keys; false: as the index gives them."""

    @classmethod
    def brute(cls, datastore: Datastore) -> "Retriever":
        """Without an index. Memory: rows × D × 4 bytes where that is at most HELD_BYTES, else little."""
        if 4 * datastore.rows * datastore.width <= HELD_BYTES:
            arrays = [
                (np.asarray(datastore.keys(shard.index), np.float32), np.asarray(datastore.values(shard.index)))
                for shard in datastore.shards
            ]
            datastore = HeldDatastore(datastore.folder, datastore.manifest, arrays)
        return cls(datastore, None)

    def candidates(self, k: int) -> int:
        """Neighbours that the index is asked for, of which exact distances choose k, as `distlm knn search` does."""
        coarse = self.exact and self.index is not None and self.index.coarse
        return k * MORE if coarse else k

    def queries(self, states: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Hidden states [n, D] as they are searched for, rounded to the keys' type: fp32 [n, D]. Raises DistlmError for
        another width, and for states that are not finite or do not fit that type."""
        with np.errstate(over="ignore"):
            rounded = states.astype(self.datastore.key_dtype).astype(np.float32)
        return check_queries(rounded, self.datastore.width, 1)

    def search(self, states: npt.NDArray[np.floating], k: int, candidates: int = 0) -> Found:
        """The k nearest keys of hidden states [n, D], which are rounded to the keys' type first; k ≥ 1.

        Of an index whose distances are recomputed they are the nearest of so many `candidates`; 0: of as many as its
        codes need (self.candidates).

        Raises DistlmError for another width, for states that are not finite or do not fit that type, and when the
        index is of another store.
        """
        queries, rows = self.queries(states), self.datastore.rows
        k = min(k, rows)
        if self.index is None:
            ids, distances = brute_search(self.datastore, queries, k)
        else:
            asked = max(k, min(candidates or self.candidates(k), rows))
            ids, distances = self.index.search(queries, asked, self.nprobe)
            if int(ids.max(initial=-1)) >= rows:
                raise DistlmError(
                    f"the index gives row {int(ids.max())}, the store has {rows}: it is of another one; build it again"
                )
            if self.exact:
                distances = exact_distances(self.datastore, queries, ids)
        ids, distances, values = nearest_first(ids, distances, stored_values(self.datastore, ids))
        return Found(ids[:, :k], distances[:, :k], values[:, :k])
