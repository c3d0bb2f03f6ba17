"""λ, temperature and k from the neighbours of a text in memory: the grid of `distlm knn tune`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from distlm.config.schema import KnnConfig
from distlm.datastore.extract import Extracted
from distlm.integrations.mixture import Mixing
from distlm.integrations.retrieve import Found
from distlm.integrations.scorer import of_batch
from distlm.knnlm.scoring import Floats, knn_log_probs
from distlm.knnlm.search.neighbours import Unit
from distlm.knnlm.tune.buckets import fit_buckets
from distlm.knnlm.tune.grid import best_of, grid_losses


@dataclass(frozen=True)
class _Searched:
    """Neighbours in memory, as the grid reads them."""

    kept: list[Unit]

    @property
    def tokens(self) -> int:
        return sum(len(unit) for unit in self.kept)

    def units(self) -> Iterator[Unit]:
        yield from self.kept

    def log_probs(self) -> Floats:
        return self.of_lm

    @cached_property
    def of_lm(self) -> Floats:
        return np.concatenate([unit.log_probs for unit in self.kept])


def tuned(blocks: Iterable[tuple[Extracted, Found]], knn: KnnConfig, buckets: int) -> Mixing:
    """The best of knn.lambdas, temperatures and ks, and with `buckets` a λ for each bucket of the nearest distance."""
    searched = _Searched([_unit(batch, near) for batch, near in blocks])
    best = best_of(grid_losses(searched, knn), knn.lambdas, knn.temperatures, knn.tried_ks)
    chosen = Mixing(best.weight, best.temperature, best.k)
    if not buckets:
        return chosen
    of_knn = np.concatenate([
        knn_log_probs(unit.distances, unit.values, unit.targets, best.temperature, [best.k])[0]
        for unit in searched.units()
    ])  # fmt: skip
    nearest = np.concatenate([unit.distances[:, 0] for unit in searched.units()])
    return replace(chosen, buckets=fit_buckets(nearest, searched.of_lm, of_knn, buckets, best.weight))


def _unit(batch: Extracted, near: Found) -> Unit:
    targets = batch.targets.numpy().astype(np.int32)
    # The grid reads no queries.
    return Unit(
        np.empty((len(targets), 0), np.float32), targets, of_batch(batch), near.ids, near.distances, near.values
    )
