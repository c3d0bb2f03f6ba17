"""Distances → probability of the target → interpolation, in log space and fp64 (Khandelwal et al., eqs. 2 and 3).

Only the target's probability is needed for perplexity, so nothing of vocabulary size is ever made.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CHUNK = 1 << 20
"""Neighbours handled at once: the largest temporary is one fp64 array of about this many numbers."""


def knn_log_probs(
    distances: npt.NDArray[np.float32],
    values: npt.NDArray[np.int32],
    targets: npt.NDArray[np.int32],
    temperature: float,
    ks: Sequence[int] | None = None,
) -> Floats:
    """log p_kNN(target) from the nearest k neighbours, for every k of `ks` (default: all of them): fp64 [len(ks), Q].

    `distances` [Q, k] squared L2, ascending in each row; `values` int32 [Q, k], −1 where there is no neighbour (such
    entries come last and weigh nothing); `targets` int32 [Q]. −inf where the target was never retrieved.
    Raises ValueError for a temperature ≤ 0, or a k outside 1..k.
    """
    queries, width = distances.shape
    ks = [width] if ks is None else list(ks)
    if temperature <= 0 or not ks or min(ks) < 1 or max(ks) > width:
        raise ValueError(f"temperature={temperature}, ks={ks}, neighbours={width}")
    result = np.empty((len(ks), queries))
    step = max(1, CHUNK // width)
    for first in range(0, queries, step):
        rows = slice(first, first + step)
        result[:, rows] = _chunk(distances[rows], values[rows], targets[rows], temperature, ks)
    return result


def interpolate(log_lm: Floats, log_knn: Floats, weight: float) -> Floats:
    """log(λ p_kNN + (1 − λ) p_LM): fp64, the shape of the inputs. Weight 0 gives `log_lm` itself, bit for bit."""
    if not 0 <= weight <= 1:
        raise ValueError(f"λ={weight} is outside [0, 1]")
    if weight == 0:
        return log_lm
    if weight == 1:
        return log_knn
    return np.logaddexp(np.log1p(-weight) + log_lm, np.log(weight) + log_knn)


def mix(log_lm: Floats, log_knn: Floats, weights: Floats | np.float64) -> Floats:
    """The same with a λ of its own for each token, `weights` in [0, 1): fp64 [Q]; `log_lm` bit for bit where λ is 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.logaddexp(np.log1p(-weights) + log_lm, np.log(weights) + log_knn))


def mean_loss(log_probs: Floats) -> float:
    """Nats per token: −mean of `log_probs` [Q], one fp64 sum in the given order."""
    return float(-np.sum(log_probs) / len(log_probs))


def _chunk(
    distances: npt.NDArray[np.float32],
    values: npt.NDArray[np.int32],
    targets: npt.NDArray[np.int32],
    temperature: float,
    ks: Sequence[int],
) -> Floats:
    rows, width = len(distances), max(ks)
    distances, values = distances[:, :width], values[:, :width]
    hit_row, hit_column = np.nonzero(values == targets[:, None])
    hit_distance = distances[hit_row, hit_column].astype(np.float64)
    nearest = distances[:, 0].astype(np.float64)
    nearest[values[:, 0] < 0] = 0.0
    weights = np.subtract(nearest[:, None], distances, dtype=np.float64)
    weights /= temperature
    weights[values < 0] = -np.inf
    np.exp(weights, out=weights)
    # The hits are summed relative to the nearest hit, not to the nearest neighbour: far hits must not underflow to 0.
    nearest_hit = np.full(rows, np.inf)
    np.minimum.at(nearest_hit, hit_row, hit_distance)
    hit_weight = np.exp((nearest_hit[hit_row] - hit_distance) / temperature)
    offset = (nearest - nearest_hit) / temperature

    edges = sorted(set(ks))
    totals = np.cumsum(np.add.reduceat(weights, [0, *edges[:-1]], axis=1), axis=1)
    result = np.empty((len(ks), rows))
    with np.errstate(divide="ignore", invalid="ignore"):
        for place, k in enumerate(ks):
            inside = hit_column < k
            hits = np.bincount(hit_row[inside], hit_weight[inside], minlength=rows)
            found = hits > 0
            result[place] = -np.inf
            result[place, found] = (np.log(hits) + offset - np.log(totals[:, edges.index(k)]))[found]
    return result
