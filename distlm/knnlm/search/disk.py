"""Disk that a search of several splits takes while it works."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class TokenBytes:
    """Bytes on disk of one token."""

    kept: int
    """Of a finished split."""
    found: int = 0
    """As phase 1 leaves it, until exact distances of its split are written; 0: it is kept as it was found."""
    scores: int = 0
    """Exact distances of its candidates, until its split is written."""

    @property
    def written(self) -> int:
        """In all."""
        return self.kept + self.found + self.scores

    @classmethod
    def of(cls, width: int, item: int, k: int, candidates: int = 0) -> "TokenBytes":
        """With keys of `width` numbers of `item` bytes; exact distances choose k of `candidates` (0: of none)."""
        head = width * item + 12
        return cls(head + 16 * k, *((head + 16 * candidates, 4 * candidates) if candidates else ()))


def peak_bytes(splits: Sequence[int], of: TokenBytes) -> int:
    """Most bytes at once of splits of so many tokens.

    What was found lies there of all of them before exact distances are taken, split after split.
    """
    total = sum(splits)
    if not of.found:
        return total * of.kept
    ends = accumulate(splits)
    return max(
        (end * of.kept + tokens * of.scores + (total - end + tokens) * of.found
         for end, tokens in zip(ends, splits, strict=True)), default=0,
    )  # fmt: skip
