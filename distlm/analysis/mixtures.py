"""Rows of the report's tables of mixtures: perplexities with their intervals, and what each part adds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distlm.knnlm.evaluate.records import Bootstrap, Difference, Interval, SplitResults
from distlm.knnlm.evaluate.table import PART_WORDS
from distlm.runtime.records import given


@dataclass(frozen=True)
class ResultCell:
    """A mixture on one split."""

    loss_nats: float
    """Nats per token."""
    perplexity: float
    """Per word."""
    interval: str
    """Of the perplexity, in words; empty without one."""


@dataclass(frozen=True)
class ResultRow:
    """A mixture."""

    name: str
    words: str
    cells: list[ResultCell]
    """One per split."""


@dataclass(frozen=True)
class DifferenceCell:
    """One mixture less another on one split."""

    perplexity: float
    """Difference of the perplexities per word."""
    interval: str
    """Of the difference, in words."""
    verdict: Literal["better", "worse", "undecided"]
    """Whether the interval leaves 0 out."""


@dataclass(frozen=True)
class DifferenceRow:
    """A pair of mixtures."""

    words: str
    cells: list[DifferenceCell]
    """One per split."""


def result_rows(splits: Mapping[str, SplitResults], parts: Sequence[str]) -> list[ResultRow]:
    """One row per mixture of `parts`."""
    return [ResultRow(name, PART_WORDS[name], [_result(split, name) for split in splits.values()]) for name in parts]


def difference_rows(splits: Mapping[str, SplitResults]) -> list[DifferenceRow]:
    """One row per pair of mixtures that every split compares."""
    tables = [(boot.differences or {}) if (boot := split.bootstrap) else {} for split in splits.values()]
    pairs = [(name, other) for name in PART_WORDS for other in tables[0].get(name, {})] if tables else []
    return [
        DifferenceRow(
            f"{PART_WORDS[name]} against {PART_WORDS[other]}", [_difference(table[name][other]) for table in tables]
        )
        for name, other in pairs if all(other in table.get(name, {}) for table in tables)
    ]  # fmt: skip


def bootstrap_words(splits: Mapping[str, SplitResults]) -> str:
    """How the intervals were made, in words; empty without any."""
    made = {name: split.bootstrap for name, split in splits.items() if split.bootstrap and split.bootstrap.intervals}
    if not made:
        return ""
    one: Bootstrap = next(iter(made.values()))
    over = ", ".join(f"{boot.groups} {boot.over} of {name}" for name, boot in made.items())
    return (
        f"{given(one.level):.0%} intervals: percentiles of {one.resamples} resamples of {over}; differences are paired "
        "over the same resamples"
    )


def _result(split: SplitResults, name: str) -> ResultCell:
    figures = split.figures(name)
    intervals = (split.bootstrap.intervals or {}) if split.bootstrap else {}
    return ResultCell(figures.loss_nats, figures.perplexity, _range(intervals.get(name)))


def _difference(found: Difference) -> DifferenceCell:
    low, high = found.interval
    verdict: Literal["better", "worse", "undecided"] = "better" if high < 0 else "worse" if low > 0 else "undecided"
    return DifferenceCell(found.perplexity, _range(found.interval), verdict)


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
