"""Perplexity of an index over a sample of the store, for `distlm index tune`.

Queries, targets and the LM's probabilities are those that `knn search` kept for the first split; the index holds a
sample of the keys, so the gain is smaller than that of the whole store, alike for every index that is compared.
"""

import numpy as np

from distlm.config.schema import KnnConfig
from distlm.datastore.reader import Datastore
from distlm.index.choose.measure import Sample
from distlm.index.pairs import stored_values
from distlm.index.search.searcher import SearchIndex, exact_places_distances
from distlm.knnlm.scoring import interpolate, knn_log_probs, mean_loss
from distlm.knnlm.search.neighbours import Neighbours
from distlm.models.perplexity import perplexity


class IndexPerplexity:
    """Perplexity with the neighbours that an index finds, at the best λ and temperature of the configured grids."""

    def __init__(
        self, neighbours: Neighbours, datastore: Datastore, sample: Sample, knn: KnnConfig, count: int
    ) -> None:
        """`count` queries, evenly spread over the split's tokens."""
        self.queries, self.targets, self.log_lm = neighbours.sample(count)
        self._sample, self._knn = sample, knn
        self._values = stored_values(datastore, sample.rows[:, None])[:, 0]

    @property
    def of_lm(self) -> float:
        """Perplexity of the LM alone on the same tokens."""
        return perplexity(mean_loss(self.log_lm))

    def __call__(self, index: SearchIndex, nprobe: int, more: int = 1) -> float:
        """Of the interpolated model; distances as the configuration wants them, exact, and then of `more` times k
        candidates, or quantised."""
        k = min(self._knn.k, index.rows)
        ids, distances = index.search(self.queries, min(more * k, index.rows), nprobe)
        if self._knn.distances == "exact":
            ids, distances = exact_places_distances(self._sample.keys, self.queries, ids)
        ids, distances = ids[:, :k], distances[:, :k]
        values = np.where(ids >= 0, self._values[ids], -1).astype(np.int32)
        losses = []
        for temperature in self._knn.temperatures:
            log_knn = knn_log_probs(distances, values, self.targets, temperature)[0]
            losses += [mean_loss(interpolate(self.log_lm, log_knn, weight)) for weight in self._knn.lambdas]
        return perplexity(min(losses))
