"""The check for misaligned rows: the loss with permuted values.

With the values of a unit's neighbours permuted, retrieval carries no information and the loss must rise to almost the
LM's − ln(1 − λ) (`ceiling_nats`, an upper bound: a little is won back by frequent words). `alarm` is true when the true
values are hardly better than the permuted ones.
"""

import math

import numpy as np
import numpy.typing as npt

from distlm.knnlm.evaluate.parts import Frozen
from distlm.knnlm.evaluate.records import Shuffled
from distlm.knnlm.scoring import interpolate, knn_log_probs, mean_loss
from distlm.knnlm.search.neighbours import Neighbours

ALARM_LAMBDA = 0.25
"""λ of the shuffled check where the frozen λ is 0."""
ALARM_NATS, ALARM_ERRORS = 0.005, 4.0
"""True values must beat permuted ones by this many nats per token, and by this many standard errors of the mean."""


def shuffled_check(
    neighbours: Neighbours, frozen: Frozen, log_lm: npt.NDArray[np.float64], log_knn: npt.NDArray[np.float64]
) -> Shuffled:
    """The loss with every unit's values permuted, beside the bound it must come near. See the module's docstring."""
    weight = frozen.weight or ALARM_LAMBDA
    shuffled = []
    for number, unit in enumerate(neighbours.units()):
        values = shuffle_values(unit.values, number)
        scores = knn_log_probs(unit.distances, values, unit.targets, frozen.temperature, [frozen.k])
        shuffled.append(scores[0])
    mixed = interpolate(log_lm, np.concatenate(shuffled), weight)
    gain = interpolate(log_lm, log_knn, weight) - mixed
    noise = float(np.std(gain)) / math.sqrt(len(gain))
    return Shuffled(
        weight=weight,
        loss_nats=mean_loss(mixed),
        ceiling_nats=mean_loss(log_lm) - math.log1p(-weight),
        alarm=bool(np.mean(gain) < max(ALARM_NATS, ALARM_ERRORS * noise)),
    )


def shuffle_values(values: npt.NDArray[np.int32], seed: int) -> npt.NDArray[np.int32]:
    """The values [q, k] permuted among all neighbours of the unit; −1 stay where they are."""
    random = np.random.Generator(np.random.Philox(key=[1, seed]))
    permuted = np.array(values)
    present = permuted >= 0
    permuted[present] = random.permutation(permuted[present])
    return permuted
