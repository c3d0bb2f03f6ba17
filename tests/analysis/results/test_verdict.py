"""The bounds that tell an effect from chance."""

import numpy as np
import pytest

from distlm.analysis.papers.seeds import Cell, Difference
from distlm.analysis.results.records import Verdict
from distlm.analysis.results.verdict import no_higher, similar, student_t


def test_student_s_t_is_that_of_the_tables() -> None:
    """Abramowitz & Stegun, table 26.10, 0.975."""
    found = {
        1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 60: 2.000, 120: 1.980, 10**6: 1.960,
    }  # fmt: skip
    assert {degrees: round(student_t(degrees), 3) for degrees in found} == found
    assert student_t(2) < student_t(1.5) < student_t(1)


@pytest.mark.parametrize(
    ("apart", "half", "verdict"),
    [
        # Equal, and all of the interval below the margin of 1; lower, but it may be higher by more than that.
        (0.0, 0.9, "appears"), (-1.0, 2.5, "cannot be said"), (-3.0, 2.5, "appears"),
        # Higher, but surely less than the margin; perhaps more; surely more.
        (0.5, 0.4, "appears"), (2.0, 1.1, "cannot be said"), (2.0, 0.9, "does not appear"),
    ],
)  # fmt: skip
def test_no_higher_is_a_bound_below_the_margin(apart: float, half: float, verdict: Verdict) -> None:
    assert no_higher(apart, half, 1.0) == verdict


@pytest.mark.parametrize(
    ("apart", "half", "verdict"),
    [(-0.5, 0.4, "appears"), (0.5, 0.6, "cannot be said"), (-2.0, 0.9, "does not appear")],
)
def test_similar_is_within_the_margin_on_both_sides(apart: float, half: float, verdict: Verdict) -> None:
    assert similar(apart, half, 1.0) == verdict


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seeds_without_an_effect_seldom_show_one(seeds: int) -> None:
    """By twice the standard error 30, 18 and 12 % of such pairs would."""
    random, draws = np.random.default_rng(seeds), 1_000
    said = {"paired": 0, "means": 0, "borrowed": 0}
    for own, other in random.standard_normal((draws, 2, seeds)).tolist():
        ours, theirs = ({str(seed): value for seed, value in enumerate(side)} for side in (own, other))
        paired = Difference.between(ours, theirs)
        borrowed = Difference.between({"0": own[0]}, {"0": random.standard_normal()}, Cell(other))
        assert paired and borrowed and borrowed.borrowed
        found = {"paired": paired, "means": Difference.of_means(Cell(own), Cell(other)), "borrowed": borrowed}
        for name, apart in found.items():
            said[name] += apart.rises() != "cannot be said"
    assert max(said.values()) < 0.075 * draws and said["paired"] > 0.03 * draws


def test_a_difference_has_the_degrees_of_what_its_error_is_of() -> None:
    own, other = {"1": 3.0, "2": 5.0, "3": 4.0}, {"1": 1.0, "2": 2.0}
    paired = Difference.between(own, other)
    assert paired and (paired.mean, paired.error, paired.degrees) == (2.5, 0.5, 1)
    assert paired.half == pytest.approx(0.5 * 12.706, rel=1e-4)
    borrowed = Difference.between({"1": 3.0}, other, Cell([*own.values()]))
    assert borrowed and borrowed.degrees == 2 and borrowed.error == pytest.approx(2**0.5)
    # One seed in common, and nothing to borrow.
    alone = Difference.between({"1": 3.0}, other, Cell([1.0]))
    assert alone and alone.half is None and alone.rises() == "cannot be said"
    # Welch: variances 1 and .5 of three and two.
    means = Difference.of_means(Cell([*own.values()]), Cell([*other.values()]))
    first, second = 1 / 3, 0.5 / 2
    assert means.degrees == pytest.approx((first + second) ** 2 / (first**2 / 2 + second**2))
    assert means.error == pytest.approx((first + second) ** 0.5)
