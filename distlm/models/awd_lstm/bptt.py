"""Streams of text for truncated back-propagation: columns of the corpus, cut into chunks of drawn length.

Both are pure functions of settings and update number: no rank, and no history, changes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from distlm.errors import DistlmError

_SHORT, _SHORT_PROBABILITY, _DEVIATION, _LEAST = 0.5, 0.05, 5.0, 5
"""Section 5 of the paper: with probability 0.05 half the base length, then Normal(length, 5), at least 5."""
_FINETUNE_OVER = 10
"""The authors' fine-tuning caps a chunk at bptt + 10."""
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Chunk:
    """One update's tokens: inputs [start, start + length) of every column, targets one further."""

    epoch: int
    number: int
    """Within the epoch, from 0."""
    start: int
    length: int
    drawn: int
    """Length that was drawn: the rate is scaled by drawn / bptt, also where the column ends sooner."""
    last: bool
    """The last of its epoch."""


def columns_of(ids: npt.NDArray[np.integer], columns: int, setting: str, split: str) -> npt.NDArray[np.integer]:
    """[columns, T]: the tokens in `columns` contiguous streams, the remainder left out; a view.

    Raises DistlmError naming `setting` when a stream would have fewer than 3 tokens.
    """
    length = len(ids) // columns
    if length < 3:
        raise DistlmError(
            f"{setting}={columns} columns of the {split} split ({len(ids)} tokens) would have {length} tokens each, "
            f"and need 3; choose {setting}={max(1, len(ids) // 3)} or less, or give more text"
        )
    return ids[: columns * length].reshape(columns, length)


class ChunkPlan:
    """Chunks of all epochs over columns of `tokens` tokens; fine-tuning epochs follow the others."""

    def __init__(self, tokens: int, bptt: int, variable: bool, seed: int, epochs: int, finetune_epochs: int) -> None:
        if bptt >= tokens:
            raise DistlmError(
                f"awd.bptt={bptt} is longer than the corpus: a column has {tokens} tokens; choose awd.bptt="
                f"{max(1, tokens // 2)} or less, or fewer columns (awd.batch)"
            )
        self.tokens, self.bptt, self.variable, self.seed, self.epochs = tokens, bptt, variable, seed, epochs
        counts = [len(self.epoch(number)) for number in range(epochs + finetune_epochs)]
        self.ends = np.cumsum(counts, dtype=np.int64)
        """Updates done at the end of each epoch: int64 [epochs]."""

    @property
    def updates(self) -> int:
        """Updates of all epochs."""
        return int(self.ends[-1])

    def chunk(self, update: int) -> Chunk:
        """Chunk of the update with this 0-based number."""
        epoch = int(np.searchsorted(self.ends, update, side="right"))
        number = update - (int(self.ends[epoch - 1]) if epoch else 0)
        chunks = self.epoch(epoch)
        start, length, drawn = chunks[number]
        return Chunk(epoch, number, start, length, drawn, number == len(chunks) - 1)

    def epoch(self, number: int) -> tuple[tuple[int, int, int], ...]:
        """(start, length, drawn) of each chunk of an epoch."""
        cap = self.bptt + _FINETUNE_OVER if number >= self.epochs else self.tokens
        return _epoch(self.tokens, self.bptt, self.variable, self.seed, number, cap)


@lru_cache(maxsize=2)
def _epoch(
    tokens: int, bptt: int, variable: bool, seed: int, number: int, cap: int
) -> tuple[tuple[int, int, int], ...]:
    chunks, start = [], 0
    draws = _lengths(bptt, seed, number)
    while start < tokens - 2:
        drawn = min(next(draws), cap) if variable else bptt
        chunks.append((start, min(drawn, tokens - 1 - start), drawn))
        start += drawn
    return tuple(chunks)


def _lengths(bptt: int, seed: int, epoch: int) -> Iterator[int]:
    """Drawn lengths; from raw Philox words, which NumPy promises for ever."""
    random = np.random.Philox(key=np.array([seed & _WORD, epoch], dtype=np.uint64))
    standard = NormalDist()
    while True:
        for word, other in random.random_raw(256).reshape(-1, 2).tolist():
            base = bptt * _SHORT if (word >> 11) * 2.0**-53 < _SHORT_PROBABILITY else bptt
            yield max(_LEAST, int(base + _DEVIATION * standard.inv_cdf(((other >> 11) + 0.5) * 2.0**-53)))
