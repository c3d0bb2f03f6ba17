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
        # Within what an fp64 can scale by.
        return cls(min(max(frexp(bound)[1] - _BITS, -960), 960))

    def __call__(self, values: Array, half: bool = False) -> Array:
        """fp64, rounded. `half`: they are values that an fp16 holds."""
        wide = values.astype(np.float64)
        if half and self.exponent <= _OF_FP16:
            return wide
        # Powers of two: neither product rounds.
        wide *= 2.0**-self.exponent
        np.rint(wide, out=wide)
        wide *= 2.0**self.exponent
        return wide


def largest(vectors: Array) -> float:
    """Largest absolute value, 0 for none. Memory: a piece of them."""
    pieces = (vectors[start : start + 4096] for start in range(0, len(vectors), 4096))
    return max((float(max(piece.max(), -piece.min())) for piece in pieces), default=0.0)
