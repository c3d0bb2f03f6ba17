"""The neural cache from its definition."""

import math

import numpy as np


def per_token(states, words, window, theta, fill, first=0):
    """log p_cache of every token from the definition, one token at a time; NaN where there is no cache."""
    states = states.astype(np.float64)
    result = np.full(len(words), np.nan)
    start = window + 1 if fill == "full" else 1
    for t in range(max(start, first), len(words)):
        past = range(max(0, t - window), t)
        weights = np.array([theta * float(states[t] @ states[i]) for i in past])
        weights = np.exp(weights - weights.max())
        mass = weights[np.array([words[i] for i in past]) == words[t]].sum() / weights.sum()
        result[t] = math.log(mass) if mass > 0 else -math.inf
    return result
