"""Confidence intervals of perplexities and of their differences: the bootstrap over documents.

A resample draws as many documents as the split has, with replacement, and takes the loss per token over all that were
drawn (Efron and Tibshirani, percentile intervals). All mixtures see the same resamples, so that the difference of two
is paired: what makes one document harder than another falls out of it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from distlm.knnlm.evaluate.documents import Groups
from distlm.knnlm.evaluate.records import Bootstrap, Difference, Interval
from distlm.knnlm.scoring import Floats
from distlm.models.perplexity import perplexities, perplexity

RESAMPLES, SEED, LEVEL = 2000, 0, 0.95
_CELLS = 1 << 22
"""Counts drawn at once."""

ADDED_TO = {
    "cache": ("lm",), "knn": ("lm",), "knn_buckets": ("lm", "knn"), "gate": ("lm", "knn"), "stores": ("lm", "knn"),
    "both": ("lm", "knn", "cache"), "both_buckets": ("lm", "both", "knn_buckets"),
}  # fmt: skip
"""What each mixture is compared with."""


def bootstrap(log_probs: Mapping[str, Floats], groups: Groups, tokens_per_word: float = 1.0) -> Bootstrap:
    """Intervals of the perplexity of each mixture, and of its differences to those of ADDED_TO.

    `log_probs` name → fp64 [Q]. tokens_per_word: of the split, where tokens are sub-words; perplexities are per word.
    Fewer than two groups have no intervals: only over and groups are there.
    """
    if len(groups.starts) < 2:
        return Bootstrap(groups.kind, len(groups.starts))
    names = list(log_probs)
    sums = np.stack([-np.add.reduceat(log_probs[name], groups.starts) for name in names], axis=1)
    tokens = np.diff(groups.starts, append=groups.tokens)
    drawn = dict(zip(names, _resampled(sums, tokens).T, strict=True))
    per_word = {name: perplexities(tokens_per_word * drawn[name]) for name in names}
    losses = {name: float(-np.sum(log_probs[name]) / groups.tokens) for name in names}
    return Bootstrap(
        groups.kind, len(groups.starts), RESAMPLES, SEED, LEVEL,
        intervals={name: _interval(per_word[name]) for name in names},
        differences={
            name: {
                other: Difference(
                    losses[name] - losses[other], _interval(drawn[name] - drawn[other]),
                    perplexity(tokens_per_word * losses[name]) - perplexity(tokens_per_word * losses[other]),
                    _interval(per_word[name] - per_word[other]),
                )
                for other in ADDED_TO[name] if other in losses
            }
            for name in names if name in ADDED_TO
        },
    )  # fmt: skip


def _resampled(sums: Floats, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> Floats:
    """Loss per token of every resample: fp64 [RESAMPLES, names]; `sums` [G, names] in nats, `tokens` [G]."""
    random = np.random.Generator(np.random.Philox(key=[3, SEED]))
    count = len(tokens)
    losses = np.empty((RESAMPLES, sums.shape[1]))
    step = max(1, _CELLS // count)
    for first in range(0, RESAMPLES, step):
        rows = losses[first : first + step]
        # How often each group was drawn: all that a sum needs.
        times = random.multinomial(count, np.full(count, 1 / count), size=len(rows)).astype(np.float64)
        rows[:] = times @ sums / (times @ tokens)[:, None]
    return losses


def _interval(values: Floats) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
