"""The loss at every λ, temperature and k from one pass over the neighbours.

223 million distances (WikiText valid, k = 1024) are read once; where the targets stand among the neighbours is found
once; per temperature there is one exponential of each distance, in fp32 relative to the nearest one, and one sum per
stretch between two values of k. The hits, which are few, are in fp64 and relative to the nearest hit, as in
scoring.py, whose values these are to about 1e-6 nats: enough to choose by, and what was chosen is scored again in fp64.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distlm.config.schema import KnnConfig
from distlm.knnlm.scoring import Floats, knn_log_probs, mean_loss
from distlm.knnlm.search.neighbours import Neighbours, Unit

CELLS = 1 << 19
"""Distances handled at once: stays in a core's cache."""


@dataclass(frozen=True)
class Best:
    """The best point of a grid."""

    weight: float
    temperature: float
    k: int
    loss: float


class Searched(Protocol):
    """Neighbours of a text, on disk or in memory."""

    @property
    def tokens(self) -> int:
        """Tokens Q."""

    def units(self) -> Iterator[Unit]:
        """In the order of the tokens."""

    def log_probs(self) -> Floats:
        """Of the language model: fp64 [Q]."""


def grid_losses(neighbours: Searched, knn: KnnConfig, tick: Callable[[], None] = lambda: None) -> Floats:
    """Nats per token at every point of the grid: fp64 [ks, temperatures, lambdas]. `tick` is called per unit."""
    lambdas = np.array(knn.lambdas)
    sums = np.zeros((len(knn.tried_ks), len(knn.temperatures), len(lambdas)))
    for unit in neighbours.units():
        step = max(1, CELLS // unit.distances.shape[1])
        for first in range(0, len(unit), step):
            rows = slice(first, first + step)
            log_lm = np.asarray(unit.log_probs[rows])
            log_knn = grid_log_probs(_cut(unit, rows), knn.temperatures, knn.tried_ks)
            # log((1 − λ) + λ r) for the ratio r of the two; e^700 is about the largest fp64.
            ratio = np.expm1(np.minimum(log_knn - log_lm, 700))
            for place, weight in enumerate(lambdas):
                sums[:, :, place] += np.log1p(weight * ratio).sum(axis=2)
        tick()
    lm_loss = mean_loss(neighbours.log_probs())
    return lm_loss - sums / neighbours.tokens


def grid_log_probs(unit: Unit, temperatures: Sequence[float], ks: Sequence[int]) -> Floats:
    """log p_kNN(target) of a unit's tokens: fp64 [len(ks), len(temperatures), q]; −inf where never retrieved."""
    edges = sorted(set(ks))
    distances, values = np.asarray(unit.distances[:, : edges[-1]]), np.asarray(unit.values[:, : edges[-1]])
    count = len(distances)
    hit_row, hit_column = np.nonzero(values == np.asarray(unit.targets)[:, None])
    stretch = np.searchsorted(edges, hit_column, side="right")
    hit_distance = distances[hit_row, hit_column].astype(np.float64)
    nearest_hit = np.full(count, np.inf)
    np.minimum.at(nearest_hit, hit_row, hit_distance)
    beyond = nearest_hit[hit_row] - hit_distance
    nearest = np.where(values[:, :1] >= 0, distances[:, :1], np.float32(0))
    below = torch.from_numpy(nearest - distances)
    weights = torch.empty_like(below)
    result = np.empty((len(ks), len(temperatures), count))
    places = [edges.index(k) for k in ks]
    for place, temperature in enumerate(temperatures):
        totals = np.cumsum(_stretch_sums(below, temperature, edges, weights), axis=0)
        cells = np.bincount(
            stretch * count + hit_row, np.exp(beyond / temperature), minlength=len(edges) * count
        )  # fmt: skip
        hits = np.cumsum(cells.reshape(len(edges), count), axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            scores = np.log(hits) - np.log(totals) + (nearest[:, 0] - nearest_hit) / temperature
        result[:, place] = np.where(hits > 0, scores, -np.inf)[places]
    return result


def best_of(losses: Floats, lambdas: Sequence[float], temperatures: Sequence[float], ks: Sequence[int]) -> Best:
    """The lowest loss of [ks, temperatures, lambdas]; if several are equal, smallest λ, then k, then temperature."""
    candidates = [
        (float(losses[a, b, c]), lambdas[c], ks[a], temperatures[b])
        for a in range(len(ks))
        for b in range(len(temperatures))
        for c in range(len(lambdas))
    ]
    loss, weight, k, temperature = min(candidates)
    return Best(weight, temperature, k, loss)


def split_knn_log_probs(neighbours: Neighbours, temperature: float, ks: Sequence[int]) -> Floats:
    """log p_kNN(target) of every token of a split, in order: fp64 [len(ks), Q]; −inf where never retrieved."""
    units = [knn_log_probs(unit.distances, unit.values, unit.targets, temperature, ks) for unit in neighbours.units()]
    return np.concatenate(units, axis=1)


def _stretch_sums(below: Tensor, temperature: float, edges: Sequence[int], weights: Tensor) -> npt.NDArray[np.float64]:
    """Σ exp(below / T) of each row between two edges: fp64 [edges, rows]; `weights` is overwritten."""
    # −inf, a neighbour that is not there, becomes a weight of 0.
    torch.mul(below, 1 / temperature, out=weights).exp_()
    sums = [weights[:, first:last].sum(dim=1) for first, last in pairwise([0, *edges])]
    return torch.stack(sums).double().numpy()


def _cut(unit: Unit, rows: slice) -> Unit:
    return Unit(*(getattr(unit, name)[rows] for name in Unit.__dataclass_fields__))
