"""What a search reads: token files, model, datastore and index, opened together and checked against each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.pairs import stored_values
from distlm.index.search.candidates import candidates_of
from distlm.index.search.searcher import SearchIndex, brute_search, exact_distances, open_index
from distlm.index.state import written_index
from distlm.knnlm.search.forward import Forward, open_forward
from distlm.knnlm.search.rescore import from_nearest, nearest_first
from distlm.models.card import model_fingerprint
from distlm.runtime.checked import Written
from distlm.runtime.local.copies import Copies
from distlm.runtime.stage import Stage


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

    @property
    def candidates(self) -> int:
        """Neighbours that the index is asked for, of which exact distances choose k."""
        return candidates_of(self.knn, self.datastore.rows, self.index is not None and self.index.coarse)

    def written(self, splits: Sequence[str], index: Path) -> list[tuple[Path, list[Written]]]:
        """Folders and the files in them that a search of these splits reads, as they were written; of none: that of
        any text. `index`: folder of the index, where there is one."""
        store = self.datastore
        found = [
            (self.tokens.folder, self.tokens.written(*splits) if splits else self.tokens.written_words()),
            (store.folder, store.written(keys=self.rescores or self.index is None)),
        ]
        if self.index is not None:
            found.append((index, written_index(index)))
        return found

    def search(
        self, queries: npt.NDArray[np.floating], k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Neighbours of queries [Q, D]: ids int64 [Q, k] (−1: none), squared L2 fp32 [Q, k]."""
        single = np.ascontiguousarray(queries, dtype=np.float32)
        if self.index is None:
            ids, distances = brute_search(self.datastore, single, k)
        else:
            ids, distances = self.index.search(single, k, self.knn.nprobe)
        self.require_rows(ids)
        return ids, distances

    def require_rows(self, ids: npt.NDArray[np.int64]) -> None:
        """Raises DistlmError for ids that are no rows of the store."""
        if int(ids.max(initial=-1)) >= self.datastore.rows:
            raise DistlmError(
                f"search returned row {int(ids.max())}, the store has {self.datastore.rows}: the index is not of this "
                "store; build it again"
            )

    def nearest(
        self, queries: npt.NDArray[np.floating], k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Neighbours of queries [Q, D] with the distances of knn.distances and knn.similarity, nearest first.

        ids int64, distances fp32, values int32, each [Q, k]: what `distlm knn search` writes for them. Here the keys of
        each neighbour are read by themselves, which suits few queries; search/work.py reads the store in order. Exact
        distances choose the k among `candidates`.
        """
        ids, distances = self.search(queries, max(k, self.candidates))
        if self.rescores:
            distances = exact_distances(self.datastore, np.asarray(queries, np.float32), ids, self.dot)
        if self.dot:
            distances = from_nearest(distances)
        ids, distances, values = nearest_first(ids, distances, self.values(ids))
        return ids[:, :k], distances[:, :k], values[:, :k]

    def values(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The stored target of each neighbour: int32, the shape of `ids` [q, k]; −1 where the id is −1."""
        return stored_values(self.datastore, ids)


def open_source(stage: Stage, copies: Copies | None = None) -> Source:
    """Open and check everything a search needs; what has `copies` is read from them.

    Raises DistlmError naming the two things that do not fit.
    """
    knn, run = stage.config.knn, stage.run
    datastore = replace(open_store(stage), copies=copies or {})
    forward = open_forward(stage)
    index = open_index(run.index, datastore, knn.scan, copies) if knn.search == "index" else None
    return source_of(forward, datastore, index)


def open_store(stage: Stage) -> Datastore:
    """The store to be searched. Raises DistlmError when it is of another model."""
    datastore = Datastore.open(stage.run.datastore)
    datastore.require_model(model_fingerprint(stage.run.model_checkpoint(stage.config)))
    return datastore


def source_of(forward: Forward, datastore: Datastore, index: SearchIndex | None) -> Source:
    """A Source of open parts. Raises DistlmError when the datastore is of another model or dictionary."""
    datastore.require_model(forward.model_fingerprint)
    datastore.require_dictionary(forward.tokens.dictionary.hash)
    return Source(
        forward.knn, forward.tokens, forward.model, forward.model_fingerprint, forward.longest, datastore, index
    )
