"""λ, temperature and k from the neighbours of a text in memory: the grid of `distlm knn tune`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

import numpy as np

from distlm.config.check import grids
from distlm.config.schema import KnnConfig
from distlm.datastore.extract import Extracted
from distlm.errors import UsageError
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


def tried(lambdas: Sequence[float], temperatures: Sequence[float], ks: Sequence[int], buckets: int) -> KnnConfig:
    """The grids, those of `distlm knn tune` where none are given. Raises UsageError for values that cannot be tried, by
    the names of these arguments."""

    def refuse(key: str, value: object, why: str) -> NoReturn:
        raise UsageError(f"{key.removeprefix('knn.')}={value}: {why}")

    knn = KnnConfig(ks=list(ks), buckets=buckets)
    knn.lambdas, knn.temperatures = list(lambdas) or knn.lambdas, list(temperatures) or knn.temperatures
    grids(knn, refuse)
    if buckets < 0:
        refuse("buckets", buckets, "must not be negative")
    return knn


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
