"""Runs that differ in their seed alone: NAME, and NAME-seedN for each further seed; their mean and how sure it is.

Two models are compared seed by seed: what a seed decides alike for both, such as the order of the data, then cancels.
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distlm.analysis.results.records import Verdict
from distlm.analysis.results.verdict import above
from distlm.training.finished import RESULT
from distlm.training.records import LmResults

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
    """Between two models, over the seeds that both have."""

    mean: float
    error: float | None
    """Standard error of the mean; None where nothing tells it."""
    borrowed: bool
    """Of one seed alone: the error is that of two independent runs with a standard deviation known from elsewhere."""

    @classmethod
    def between(
        cls, own: Mapping[str, float], other: Mapping[str, float], deviation: float | None = None
    ) -> "Difference | None":
        """`own` less `other`, both seed → figure; None where they have no seed in common.

        `deviation`: standard deviation over the seeds of a model like them, for where there is one seed in common.
        """
        cell = Cell.of(own[seed] - other[seed] for seed in own if seed in other)
        if cell is None:
            return None
        if cell.error is not None:
            return cls(cell.mean, cell.error, borrowed=False)
        return cls(cell.mean, None if deviation is None else math.sqrt(2) * deviation, borrowed=deviation is not None)

    def rises(self) -> Verdict:
        """Of the finding that `own` is higher, by more than two standard errors."""
        return "cannot be said" if self.error is None else above(self.mean, 0.0, 2 * self.error)

    def falls(self) -> Verdict:
        """Of the finding that `own` is lower, by more than two standard errors."""
        return "cannot be said" if self.error is None else above(0.0, self.mean, 2 * self.error)


def error_between(one: Cell, other: Cell) -> float | None:
    """Standard error of the difference of two means; None where one of them has one seed."""
    return None if one.error is None or other.error is None else math.hypot(one.error, other.error)


def higher(one: Cell, other: Cell) -> Verdict:
    """Of the finding that a mean is above another one, by more than two standard errors of their difference."""
    error = error_between(one, other)
    return "cannot be said" if error is None else above(one.mean, other.mean, 2 * error)


def place_of(cell: Cell) -> str:
    """How a mean and its standard error, if it has one, are shown in a figure."""
    return "{:.2f}" if cell.error is None else "{:.2f} ± {:.2f}"


def numbers_of(cell: Cell) -> list[float]:
    """The numbers of those places."""
    return [cell.mean] if cell.error is None else [cell.mean, cell.error]
