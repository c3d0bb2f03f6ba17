"""Comparisons, where one runs, and what each of its turns gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

OURS = "distlm"
COMPARISONS = {
    "knn": "kNN evaluation",
    "lstm": "Training step of an AWD-LSTM",
    "plm": "Training step of a masked model",
    "lm": "Training step of a transformer LM",
}
"""Each is `peer/NAME.py`, whose `turns` is called with a Place in a process of its own."""


@dataclass(frozen=True)
class Place:
    """Where a comparison runs."""

    text: Path
    """Folder of {train,valid,test}.txt."""
    folder: Path
    """Of its own, empty."""
    turns: int
    """Most turns."""
    threads: int
    quick: bool
    """At the smallest sizes, which give no figures."""


class Side(NamedTuple):
    """What one side reached in a turn."""

    tokens_per_s: float
    perplexity: float
    """Of the same tokens for all sides."""


class Turn(NamedTuple):
    """distlm and its peers, one after the other."""

    size: str
    """Of the problem, in words."""
    sides: Mapping[str, Side]
    """OURS first, then each peer by what it is."""

    @staticmethod
    def of(printed: list[object]) -> "Turn":
        """From the list that JSON has of one."""
        size, sides = printed
        assert isinstance(size, str) and isinstance(sides, dict)
        return Turn(size, {name: Side(*side) for name, side in sides.items()})
