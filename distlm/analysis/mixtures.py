"""Rows of the report's tables of mixtures: perplexities with their intervals, and what each part adds."""

from collections.abc import Mapping, Sequence
from typing import Any

from distlm.knnlm.evaluate.table import PART_WORDS


def result_rows(splits: Mapping[str, Any], parts: Sequence[str]) -> list[dict[str, Any]]:
    """One row per mixture: its name, words, and for every split loss_nats, perplexity and interval (text or '')."""
    return [
        {
            "name": name, "words": PART_WORDS[name],
            "cells": [
                {**split[name], "interval": _range(split.get("bootstrap", {}).get("intervals", {}).get(name))}
                for split in splits.values()
            ],
        }
        for name in parts
    ]  # fmt: skip


def difference_rows(splits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per pair of mixtures: words, and for every split the difference of perplexities, its interval, and
    whether the interval leaves 0 out (better, worse or neither)."""
    tables = [split.get("bootstrap", {}).get("differences", {}) for split in splits.values()]
    pairs = [(name, other) for name in PART_WORDS for other in tables[0].get(name, {})] if tables else []
    return [
        {
            "words": f"{PART_WORDS[name]} against {PART_WORDS[other]}",
            "cells": [_difference(table[name][other]) for table in tables],
        }
        for name, other in pairs if all(other in table.get(name, {}) for table in tables)
    ]  # fmt: skip


def bootstrap_words(splits: Mapping[str, Any]) -> str:
    """How the intervals were made, in words; empty without any."""
    made = {name: split["bootstrap"] for name, split in splits.items() if "intervals" in split.get("bootstrap", {})}
    if not made:
        return ""
    one = next(iter(made.values()))
    over = ", ".join(f"{boot['groups']} {boot['over']} of {name}" for name, boot in made.items())
    return (
        f"{one['level']:.0%} intervals: percentiles of {one['resamples']} resamples of {over}; differences are paired "
        "over the same resamples"
    )


def _difference(found: Mapping[str, Any]) -> dict[str, Any]:
    low, high = found["interval"]
    verdict = "better" if high < 0 else "worse" if low > 0 else "undecided"
    return {"perplexity": found["perplexity"], "interval": _range(found["interval"]), "verdict": verdict}


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
