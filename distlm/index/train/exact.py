"""Sums that do not depend on their order, so that any number of ranks and threads makes the same bits.

Every number is rounded to a multiple of one power of two, which is so large that no sum of all of them needs more than
the 53 bits of an fp64: each addition is exact then. Keys are fp16, whose values are multiples of 2⁻²⁴: a million of
them below 2⁹ are not rounded at all. For others the unit is 2⁻⁵² of the largest sum that could be.
"""

from dataclasses import dataclass
from math import frexp

import numpy as np

from distlm.index.layout import Array
from distlm.runtime.ranks.comm import Comm

_BITS = 52
_OF_FP16 = -24
"""Exponent of the smallest fp16."""


@dataclass(frozen=True)
class Exact:
    """Rounds to multiples of 2^exponent."""

    exponent: int

    @classmethod
    def of(cls, comm: Comm, largest: float, terms: int) -> "Exact":
        """For sums of `terms` numbers of at most `largest` (this rank's) in size. Collective."""
        bound = max(comm.allgather(largest)) * terms
        return cls(frexp(bound)[1] - _BITS)

    def __call__(self, values: Array) -> Array:
        """fp64, rounded."""
        wide = values.astype(np.float64)
        if values.dtype == np.float16 and self.exponent <= _OF_FP16:
            return wide
        rounded: Array = np.ldexp(np.rint(np.ldexp(wide, -self.exponent)), self.exponent)
        return rounded


def largest(vectors: Array) -> float:
    """Largest absolute value, 0 for none. Memory: a piece of them."""
    pieces = (vectors[start : start + 4096] for start in range(0, len(vectors), 4096))
    return max((float(max(piece.max(), -piece.min())) for piece in pieces), default=0.0)
