"""Runs that differ in their seed alone: NAME, and NAME-seedN for each further seed; their mean and how sure it is.

Two models are compared seed by seed: what a seed decides alike for both, such as the order of the data, then cancels.
A difference is told from chance by Student's t, for its standard error is estimated from the same few seeds.
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distlm.analysis.results.records import Verdict
from distlm.analysis.results.verdict import above, student_t
from distlm.training.finished import RESULT
from distlm.training.records import LmResults

BY_T = "Student's t has at 95 % (12.7 standard errors of two seeds, 4.3 of three, 2.8 of five)"
"""By how much an effect must differ from 0, in words, behind `more than`."""
_SEED = "-seed"


def model_and_seed(run: str) -> tuple[str, str]:
    """Name of the model, and the seed in words; empty for the first one."""
    model, _, seed = run.partition(_SEED)
    return model, seed


def finished_runs(root: Path, name: str) -> dict[str, LmResults]:
    """Finished runs of a model: the one of its name, then those of more seeds."""
    seeds = [path.name for path in root.glob(f"{name}{_SEED}*") if re.fullmatch(rf"{name}{_SEED}\d+", path.name)]
    names = [name, *sorted(seeds, key=lambda seed: int(model_and_seed(seed)[1]))]
    return {one: LmResults.read(root / one / RESULT) for one in names if (root / one / RESULT).exists()}


@dataclass(frozen=True)
class Cell:
    """One figure of one model, of each seed."""

    values: list[float]

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Cell | None":
        """Of those seeds that have a value; None when there is none."""
        found = [value for value in values if value is not None]
        return cls(found) if found else None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n − 1); None of one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None of one seed."""
        return None if self.deviation is None else self.deviation / math.sqrt(len(self.values))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.deviation is None else f"{self.mean:.2f} ± {self.deviation:.2f}"


@dataclass(frozen=True)
class Difference:
    """Between two models, over the seeds that both have, or between their means."""

    mean: float
    error: float | None
    """Standard error of the mean; None where nothing tells it."""
    borrowed: bool
    """Of one seed alone: the error is that of two independent runs with a standard deviation known from elsewhere."""
    degrees: float | None = None
    """Degrees of freedom of the error, as many as what it is estimated from has; None without an error."""

    @classmethod
    def between(
        cls, own: Mapping[str, float], other: Mapping[str, float], like: Cell | None = None
    ) -> "Difference | None":
        """`own` less `other`, both seed → figure; None where they have no seed in common.

        `like`: figures of a model like them, whose deviation over its seeds stands for theirs where there is one seed
        in common.
        """
        cell = Cell.of(own[seed] - other[seed] for seed in own if seed in other)
        if cell is None:
            return None
        if cell.error is not None:
            return cls(cell.mean, cell.error, borrowed=False, degrees=len(cell.values) - 1)
        if like is None or like.deviation is None:
            return cls(cell.mean, None, borrowed=False)
        return cls(cell.mean, math.sqrt(2) * like.deviation, borrowed=True, degrees=len(like.values) - 1)

    @classmethod
    def of_means(cls, own: Cell, other: Cell) -> "Difference":
        """The mean of `own` less that of `other`, whose seeds need not be the same (Welch 1947)."""
        apart = own.mean - other.mean
        if own.error is None or other.error is None:
            return cls(apart, None, borrowed=False)
        parts = [(cell.error or 0.0) ** 2 for cell in (own, other)]
        counts = [len(cell.values) - 1 for cell in (own, other)]
        below = sum(part**2 / count for part, count in zip(parts, counts, strict=True))
        degrees = sum(parts) ** 2 / below if below else min(counts)
        return cls(apart, math.sqrt(sum(parts)), borrowed=False, degrees=degrees)

    @property
    def half(self) -> float | None:
        """Half the width of its 95 % interval; None without an error."""
        return None if self.error is None or self.degrees is None else student_t(self.degrees) * self.error

    def rises(self) -> Verdict:
        """Of the finding that `own` is higher: by more than half of the interval."""
        return "cannot be said" if self.half is None else above(self.mean, 0.0, self.half)

    def falls(self) -> Verdict:
        """Of the finding that `own` is lower: by more than half of the interval."""
        return "cannot be said" if self.half is None else above(0.0, self.mean, self.half)


def place_of(cell: Cell) -> str:
    """How a mean and its standard error, if it has one, are shown in a figure."""
    return "{:.2f}" if cell.error is None else "{:.2f} ± {:.2f}"


def numbers_of(cell: Cell) -> list[float]:
    """The numbers of those places."""
    return [cell.mean] if cell.error is None else [cell.mean, cell.error]
