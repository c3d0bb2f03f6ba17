"""Measures of how the slots of a memory are used, from counts per slot (Kim & Jung §3.2, §7; Lample et al. 2019).

Counts are arrays [K] of numpy or torch (on any device), of any number type; everything is computed in fp64. A measure
of shares (Kullback–Leibler, Gini) of counts that are all zero is NaN.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Counts: TypeAlias = npt.NDArray[np.generic] | torch.Tensor
Float64: TypeAlias = npt.NDArray[np.float64]

SPREAD = 0.01
"""Share of each class's use that `class_divergence` spreads evenly over all slots."""


def used_share(counts: Counts) -> float:
    """Share of the slots with a count above 0: MU of reads, top-1 MU of top-1 reads."""
    return float(np.mean(_array(counts) > 0))


def divergence_from_uniform(counts: Counts) -> float:
    """KL(p ‖ uniform) = log K + Σ p·log p in nats, p the shares: KL_u of reads, KL_w of weights. 0 to log K."""
    shares = _shares(counts)
    present = shares[shares != 0]
    return math.log(len(shares)) + float(np.sum(present * np.log(present)))


def gini(counts: Counts) -> float:
    """0 when all slots are used alike, 1 − 1/K when one is used alone. XLM's number is this minus 1/K."""
    shares = np.sort(_shares(counts))
    return 1 + 1 / len(shares) - 2 * float(np.mean(np.cumsum(shares)))


def class_divergence(counts: Counts, others: Counts, spread: float = SPREAD) -> float:
    """KL(p ‖ q) in nats between the use of the slots by two classes of examples (Kim & Jung, Fig. 4: top-1 reads of
    positive and of negative ones).

    A slot that only the first class uses would make it infinite, and the paper does not say what it did: here p and q
    are each (1 − spread)·shares + spread/K, which does not depend on how many examples a class has.
    """
    p, q = ((1 - spread) * shares + spread / len(shares) for shares in (_shares(counts), _shares(others)))
    present = p > 0
    with np.errstate(divide="ignore"):
        return float(np.sum(p[present] * np.log(p[present] / q[present]))) if not np.isnan(p).any() else math.nan


def intersection_over_union(counts: Counts, others: Counts) -> float:
    """Σ min(p, q) / Σ max(p, q) of the shares of two classes (Kim & Jung §7): 1 when they use the slots alike."""
    p, q = _shares(counts), _shares(others)
    return float(np.minimum(p, q).sum() / np.maximum(p, q).sum())


def staleness(last: Counts, edges: Sequence[int]) -> npt.NDArray[np.int64]:
    """Histogram of the number of the update that last used a slot (0: none): [len(edges)] counts of slots.

    Edges rise; entry i counts the slots with edges[i − 1] < last ≤ edges[i], the first all up to edges[0]. With
    edges 0, 100k, …, 500k: never used, last used in the first 100k updates, … Raises ValueError if a slot is later.
    """
    values = _array(last)
    if list(edges) != sorted(set(edges)) or values.max() > edges[-1]:
        raise ValueError(f"edges {list(edges)} for slots used up to update {values.max():.0f}")
    return np.bincount(np.searchsorted(np.asarray(edges), values), minlength=len(edges))


def _array(counts: Counts) -> Float64:
    array = counts.detach().cpu().numpy() if isinstance(counts, torch.Tensor) else counts
    return np.asarray(array, np.float64)


def _shares(counts: Counts) -> Float64:
    values = _array(counts)
    total = values.sum()
    return values / total if total else np.full(len(values), math.nan)
