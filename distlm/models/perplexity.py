"""Perplexity of a loss in nats per word or token.

It ends at e^700, which is near the largest fp64: a model that cannot predict a text at all may need hundreds of nats
for a token, and more for a word of several.
"""

import math

import numpy as np
import numpy.typing as npt

MOST_NATS = 700.0


def perplexity(nats: float) -> float:
    """exp of `nats`; of more than MOST_NATS that of MOST_NATS."""
    return math.exp(min(nats, MOST_NATS))


def perplexities(nats: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The same of each of `nats`: fp64, the same shape."""
    return np.asarray(np.exp(np.minimum(np.asarray(nats, np.float64), MOST_NATS)))
