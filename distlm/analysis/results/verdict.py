"""Whether a paper's finding is seen in figures of a few seeds, by a rule that is the same for all."""

from collections.abc import Iterable

from distlm.analysis.results.records import Verdict

MARGIN = 0.01
"""Perplexities of one seed that are no further apart, relatively, say nothing."""
MARGIN_POINTS = 3.0
"""Scores in % of one seed that are no further apart say nothing: a standard error of the smallest task of GLUE."""


def lower(ours: float, than: float, margin: float = MARGIN) -> Verdict:
    """Of the finding that a perplexity is lower than another one, by more than `margin` of that."""
    return above(than, ours, margin * than)


def above(ours: float, other: float, margin: float = MARGIN_POINTS) -> Verdict:
    """Of the finding that a figure is above another one, by more than `margin`."""
    if abs(ours - other) <= margin:
        return "cannot be said"
    return "appears" if ours > other else "does not appear"


def no_higher(ours: float, than: float, margin: float) -> Verdict:
    """Of the finding that a figure is no higher than another one: seen where it is equal or lower, however little, and
    not where it is higher by more than `margin`."""
    if ours <= than:
        return "appears"
    return "does not appear" if ours - than > margin else "cannot be said"


def similar(apart: float, error: float, margin: float) -> Verdict:
    """Of the finding that two figures are no further apart than `margin`: with two standard errors on either side, all
    of the difference must be within it to be seen, and all outside not to be."""
    if abs(apart) + 2 * error <= margin:
        return "appears"
    return "does not appear" if abs(apart) - 2 * error > margin else "cannot be said"


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """Of several figures for one finding: what all say, or nothing."""
    found = set(verdicts)
    return found.pop() if len(found) == 1 else "cannot be said"
