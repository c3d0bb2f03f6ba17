"""An index that answers with words."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distlm.api.words import Words
from distlm.config.schema import KnnConfig
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError

if TYPE_CHECKING:
    from distlm.index import SearchIndex


@dataclass(frozen=True)
class SearchResult:
    """Neighbours of n vectors, each row nearest first."""

    ids: npt.NDArray[np.int64]
    """int64 [n, k]: rows of the datastore; −1 where fewer than k were found."""
    distances: npt.NDArray[np.float32]
    """fp32 [n, k]: squared L2; inf where the id is −1."""
    values: npt.NDArray[np.int32]
    """int32 [n, k]: token ids that the rows hold; −1 where the id is −1."""
    _words: Words

    @property
    def words(self) -> list[list[str]]:
        """The same as words: n lists of at most k."""
        return [self._words[row[row >= 0].tolist()] for row in self.values]


class Index:
    """The finished index of a run, memory-mapped."""

    def __init__(self, opened: "SearchIndex", folder: Path, datastore: Datastore, words: Words, knn: KnnConfig) -> None:
        self.searcher = opened
        """The index itself."""
        self.folder = folder
        """merged.index in it is a stock faiss file, unless the run was made with index.merge=false."""
        self._datastore, self._words, self._knn = datastore, words, knn

    def __len__(self) -> int:
        """N, its keys."""
        return self.searcher.rows

    @property
    def width(self) -> int:
        """D of keys and queries."""
        return self.searcher.shape.width

    @property
    def nlist(self) -> int:
        """Inverted lists."""
        return self.searcher.nlist

    def search(
        self,
        vectors: npt.NDArray[np.floating[Any]],
        k: int | None = None,
        nprobe: int | None = None,
        exact: bool | None = None,
    ) -> SearchResult:
        """The k nearest keys of `vectors` [n, D] (float16, float32 or float64) among nprobe lists.

        `exact`: order them by the squared L2 to the true keys, else to the keys as the index encodes them. What is
        left out is as the run has it (knn.k, knn.nprobe, knn.distances, and knn.candidates). The numbers are those of
        `distlm index search`. Raises DistlmError for another width than D, NaN or infinite vectors, and k below 1.
        """
        from distlm.index.pairs import stored_values
        from distlm.index.search.candidates import candidates_of
        from distlm.index.search.searcher import exactly_ordered

        knn = replace(self._knn, k=self._knn.k if k is None else k)
        # A search for more candidates would not see it.
        if knn.k < 1:
            raise DistlmError(f"k={knn.k}: must be at least 1")
        if exact is not None:
            knn.distances = "exact" if exact else "quantised"
        asked = np.ascontiguousarray(vectors, dtype=np.float32)
        candidates = candidates_of(knn, len(self), self.searcher.coarse)
        ids, distances = self.searcher.search(asked, candidates, knn.nprobe if nprobe is None else nprobe)
        if knn.distances == "exact":
            ids, distances = exactly_ordered(self._datastore, asked, ids, knn.k)
        return SearchResult(ids, distances, stored_values(self._datastore, ids), self._words)
