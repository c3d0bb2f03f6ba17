"""λ by the distance of the nearest neighbour: a constant in each of some buckets of equally many tokens.

The nearer the nearest neighbour, the more the neighbours know. 64 buckets brought the kNN-LM of WikiText-103 from 16.06
to 15.72 on valid (Drozdov et al. 2022, "You can't pick your neighbors, or can you?"; λ of 0, 0.01, …, 0.99 each).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distlm.knnlm.scoring import Floats
from distlm.knnlm.tune.records import BucketValues, TunedBothBuckets

LAMBDAS = np.arange(100) / 100


@dataclass(frozen=True)
class Buckets:
    """B buckets of the nearest squared L2 distance."""

    edges: Floats
    """fp64 [B − 1], rising: bucket i holds distances from edges[i − 1] on, below edges[i]."""
    lambdas: Floats
    """fp64 [B]."""

    def weights(self, nearest: npt.NDArray[np.floating]) -> Floats:
        """λ of each token from its nearest distance [Q]: fp64 [Q]; 0 for a token without any neighbour (inf)."""
        return np.where(np.isposinf(nearest), 0.0, self.lambdas[np.searchsorted(self.edges, nearest, side="right")])

    def record(self) -> BucketValues:
        """For knn.json."""
        return BucketValues(self.edges.tolist(), self.lambdas.tolist())

    @classmethod
    def of(cls, record: BucketValues | TunedBothBuckets) -> "Buckets":
        """The same again, every bit."""
        return cls(np.array(record.edges), np.array(record.lambdas))


def fit_buckets(
    nearest: npt.NDArray[np.floating], without: Floats, with_knn: Floats, count: int, default: float
) -> Buckets:
    """`count` buckets of equally many tokens and the best λ of each for (1 − λ) p_without + λ p_with.

    `nearest` [Q], `without` and `with_knn` log-probabilities fp64 [Q]. Of equal losses the smallest λ; a bucket that no
    token falls into (equal distances, few tokens) has λ `default`.
    """
    there = np.isfinite(nearest)
    nearest, without, with_knn = nearest[there], without[there], with_knn[there]
    if not len(nearest):
        return Buckets(np.empty(0), np.array([default]))
    edges = np.unique(np.quantile(nearest.astype(np.float64), np.arange(1, count) / count))
    bucket = np.searchsorted(edges, nearest, side="right")
    # log((1 − λ) + λ r) for the ratio r of the two; e^700 is about the largest fp64.
    ratio = np.expm1(np.minimum(with_knn - without, 700))
    gains = np.stack([np.bincount(bucket, np.log1p(weight * ratio), minlength=len(edges) + 1) for weight in LAMBDAS])
    filled = np.bincount(bucket, minlength=len(edges) + 1) > 0
    return Buckets(edges, np.where(filled, LAMBDAS[gains.argmax(axis=0)], default))
