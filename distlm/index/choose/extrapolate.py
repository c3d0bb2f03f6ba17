"""What a factory measured on samples of a store would give on the whole of it.

Time: a query compares itself with P·n / L codes (P of L lists are read, n keys), and does some things besides:
t = a + b · P·n / L. Where L grows as √n, finding the lists does so too, and is part of b; where L stays, it is part of
a.

Recall: k is the same share of n in all samples, so that neighbours are as far away as in the whole store. What changes
is how finely the keys are cut: −log(1 − recall), which counts how often a neighbour would be met, is taken to be a
power of n. (2,000 and 8,000 normal keys foretell recall among 32,000 to ± .04; by the odds of recall it was ± .2.)
"""

from collections.abc import Sequence
from math import exp, expm1, log, log1p

LEAST, MOST = 1e-4, 1 - 1e-4
"""Recall that counts as none and as all."""
_LARGEST = 700.0
"""exp of it is still a number."""


def time_at(scanned: Sequence[float], times: Sequence[float], wanted: float) -> float:
    """Time at `wanted` codes a query from `times` at `scanned`, of the smallest and the largest sample.

    Neither part is negative: a larger sample that was faster says that the number of codes does not matter.
    """
    (few, many), (early, late) = (scanned[0], scanned[-1]), (times[0], times[-1])
    if many <= few:
        return late
    each = min(max(0.0, (late - early) / (many - few)), late / many)
    return late + each * (wanted - many)


def recall_at(keys: Sequence[int], recalls: Sequence[float], rows: int, now: float | None = None) -> float:
    """Recall in a store of `rows` keys from `recalls` in samples of `keys`, the smallest and the largest of them.

    `now`: recall in the largest whose fall is taken to be that of `recalls`; by default their last.
    """
    last = recalls[-1] if now is None else now
    if keys[-1] == keys[0] or rows == keys[-1]:
        return last
    power = log(_met(recalls[-1]) / _met(recalls[0])) / log(keys[-1] / keys[0])
    return -expm1(-_met(last) * exp(min(power * log(rows / keys[-1]), _LARGEST)))


def _met(share: float) -> float:
    return -log1p(-min(max(share, LEAST), MOST))
