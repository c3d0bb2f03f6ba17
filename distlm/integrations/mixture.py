"""λ p_kNN + (1 − λ) p_LM over all tokens, where only the neighbours' tokens are touched."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distlm.errors import UsageError
from distlm.integrations.gated import GatedWeights
from distlm.integrations.retrieve import Found
from distlm.knnlm.scoring import Floats
from distlm.knnlm.tune.buckets import Buckets

GATE_ELSEWHERE = (
    "λ by the gate (mixture='gate') is read by KnnLM.log_probs and KnnLogitsProcessor alone: take mixture='knn' or "
    "'knn_buckets'"
)


@dataclass(frozen=True)
class Mixing:
    """λ, temperature and k. Raises UsageError for values that cannot be."""

    lam: float = 0.25
    """λ of p_kNN, constant (Khandelwal et al. 2020 chose 0.25 for WikiText-103); not read where there are buckets or a
    gate."""
    temperature: float = 1.0
    """T of softmax(−d / T), in units of squared L2."""
    k: int = 1024
    """Neighbours of each token; all rows where the store has fewer."""
    candidates: int = 0
    """Neighbours that an index finds, of which the k nearest by their exact distance count; 0: k, or 2k where its codes
    are coarse, as knn.candidates."""
    buckets: Buckets | None = None
    """λ by the distance of the nearest neighbour (Drozdov et al. 2022), as `distlm knn tune` fits it."""
    gate: GatedWeights | None = None
    """λ by what is known before the search (He et al. 2021), as `distlm knn tune` fits it; where it is there, buckets
    are not read."""

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise UsageError(f"lam={self.lam}: λ must be from 0 to 1")
        if not self.temperature > 0:
            raise UsageError(f"temperature={self.temperature}: must be above 0")
        if self.k < 1:
            raise UsageError(f"k={self.k}: must be at least 1")

    @property
    def searches(self) -> bool:
        """Neighbours count at all."""
        return self.buckets is not None or self.gate is not None or self.lam > 0

    def lambdas(self, found: Found) -> Floats:
        """λ of each query, constant or by the distance: fp64 [n]; 0 where nothing was found, so that the mixture over
        all words sums to 1. (The figure of one token, Scorer.tokens and `distlm knn evaluate`, keeps λ there.) Raises
        UsageError where λ is the gate's, which is known before the search."""
        there = found.values[:, 0] >= 0
        if self.gate is not None:
            raise UsageError(GATE_ELSEWHERE)
        if self.buckets is None:
            return np.where(there, self.lam, 0.0)
        return np.where(there, self.buckets.weights(found.distances[:, 0]), 0.0)


def mixed(scores: Tensor, tokens: npt.NDArray[np.integer], shares: Floats, lambdas: Floats) -> Tensor:
    """Log-probabilities of the mixture (Khandelwal et al. 2020, eq. 3): fp32 [n, V], a new tensor.

    `scores` [n, V]: logits or log-probabilities of the language model; `tokens` int [n, k]: the neighbours' columns,
    −1 where there is none; `shares` fp64 [n, k]: their shares of p_kNN; `lambdas` fp64 [n]. A column of −∞ stays −∞:
    what was forbidden stays so, and a row then sums to less than 1.

    Two passes over [n, V] (log_softmax, and an addition in place) and one over [n, k]; with λ = 0 it is log_softmax.
    """
    columns = scores.shape[1]
    with np.errstate(divide="ignore"):
        of_lm, of_knn = np.log1p(-lambdas), np.log(lambdas)
    scores = scores.float()
    result = scores.log_softmax(dim=1).add_(torch.from_numpy(of_lm).to(scores)[:, None])
    row, column = np.nonzero((tokens >= 0) & (lambdas > 0)[:, None])
    if not len(row):
        return result
    # The same token among the neighbours of a row counts once, with all their shares.
    cells, inverse = np.unique(row * columns + tokens[row, column], return_inverse=True)
    with np.errstate(divide="ignore"):
        added = np.log(np.bincount(inverse, shares[row, column])) + of_knn[cells // columns]
    place = torch.from_numpy(cells).to(scores.device)
    flat = result.view(-1)
    before = flat[place]
    after = torch.logaddexp(before, torch.from_numpy(added).to(before))
    flat[place] = torch.where(scores.reshape(-1)[place] == -torch.inf, before, after)
    return result
