"""Whether a paper's finding is seen in figures, by rules that are the same for all.

Figures of several runs have a 95 % interval: their difference, and half of the interval's width on either side of it,
which is Student's t times the standard error. Figures of one run have a stated margin in place of that half.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np

from distlm.analysis.results.records import Verdict

MARGIN = 0.01
"""Perplexities of one seed that are no further apart, relatively, say nothing; and what still counts as equal."""
MARGIN_OF_USE = 3.0
"""Shares of a memory's slots, in %, of one seed that are no further apart say nothing. A convention, as MARGIN is: the
deviation over seeds takes its place where there are several."""
_CONFIDENCE = 0.95
_ANGLES = 20_001
_FARTHEST = 40.0


@functools.cache
def student_t(degrees: float) -> float:
    """Standard errors on either side of a mean that a two-sided 95 % interval has: the 0.975 quantile of Student's t.

    `degrees` of freedom, 1 or more, need not be whole. From the distribution in the angle θ of t = √ν tan θ, whose
    density goes with cos^(ν − 1) θ (Abramowitz & Stegun, 26.7.3 and 26.7.4); relative error below 1e-5.
    """
    # Of many degrees all of the distribution lies at small angles.
    angles = np.linspace(0, min(math.pi / 2, _FARTHEST / math.sqrt(degrees)), _ANGLES)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return math.sqrt(degrees) * math.tan(np.interp(_CONFIDENCE * below[-1], below, angles))


def lower(ours: float, than: float, margin: float = MARGIN) -> Verdict:
    """Of the finding that a perplexity is lower than another one, by more than `margin` of that."""
    return above(than, ours, margin * than)


def above(ours: float, other: float, margin: float) -> Verdict:
    """Of the finding that a figure is above another one, by more than `margin`."""
    if abs(ours - other) <= margin:
        return "cannot be said"
    return "appears" if ours > other else "does not appear"


def no_higher(apart: float, half: float, margin: float) -> Verdict:
    """Of the finding that a figure is no higher than another one by more than `margin`; `apart`: how much higher it is,
    `half` of its interval's width. Seen where the whole interval is below the margin, and not where it is above."""
    if apart + half <= margin:
        return "appears"
    return "does not appear" if apart - half > margin else "cannot be said"


def similar(apart: float, half: float, margin: float) -> Verdict:
    """Of the finding that two figures are no further apart than `margin`: seen where the whole interval is within it on
    both sides, and not where it is outside of it."""
    return no_higher(abs(apart), half, margin)


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """Of several figures for one finding: what all say, or nothing."""
    found = set(verdicts)
    return found.pop() if len(found) == 1 else "cannot be said"
