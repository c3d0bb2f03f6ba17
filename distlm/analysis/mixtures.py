"""The report's tables of mixtures: perplexities with their intervals, and what each part adds."""

from collections.abc import Mapping, Sequence

from distlm.analysis.tables import Table
from distlm.knnlm.evaluate.records import Bootstrap, Difference, Interval, SplitResults
from distlm.knnlm.evaluate.table import PART_WORDS
from distlm.runtime.records import given


def results_of(splits: Mapping[str, SplitResults], parts: Sequence[str], intervals: bool) -> Table:
    """One row per mixture of `parts`; of each split perplexity per word, its interval where there are `intervals`, and
    nats per token. The best of each column is marked."""
    head, lowest = ["perplexity per word"], []
    for name in splits:
        lowest += [len(head), len(head) + 1 + intervals]
        head += [name, *["interval"] * intervals, f"{name}, nats"]
    rows = [[PART_WORDS[name], *(text for split in splits.values() for text in _result(split, name, intervals))]
            for name in parts]  # fmt: skip
    return Table.of(head, rows, lowest)


def differences_of(splits: Mapping[str, SplitResults]) -> Table:
    """One row per pair of mixtures that every split compares: per split the difference of the perplexities per word,
    its interval, and whether that leaves 0 out. No rows without intervals."""
    tables = [(boot.differences or {}) if (boot := split.bootstrap) else {} for split in splits.values()]
    pairs = [(name, other) for name in PART_WORDS for other in tables[0].get(name, {})] if tables else []
    head = ["difference of perplexities", *(text for name in splits for text in (name, "interval", "verdict"))]
    rows = [
        [f"{PART_WORDS[name]} against {PART_WORDS[other]}",
         *(text for table in tables for text in _difference(table[name][other]))]
        for name, other in pairs if all(other in table.get(name, {}) for table in tables)
    ]  # fmt: skip
    return Table.of(head, rows)


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


def _result(split: SplitResults, name: str, intervals: bool) -> list[str]:
    figures = split.figures(name)
    found = (split.bootstrap.intervals or {}) if split.bootstrap else {}
    return [f"{figures.perplexity:.2f}", *[_range(found.get(name))] * intervals, f"{figures.loss_nats:.4f}"]


def _difference(found: Difference) -> list[str]:
    low, high = found.interval
    verdict = "better" if high < 0 else "worse" if low > 0 else "undecided"
    return [f"{found.perplexity:+.2f}", _range(found.interval), verdict]


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
