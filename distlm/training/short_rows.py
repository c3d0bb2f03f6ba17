"""Sequence-length warm-up by reshaping: the first updates see their rows cut into short pieces.

The tokens of an update, their order and their masks stay what they are without it; only how far attention reaches
changes, and with it the cost (Press et al. 2021, "Shortformer"; Li et al. 2022, "The Stability-Efficiency Dilemma").
"""

from distlm.config.plm import PlmConfig
from distlm.errors import DistlmError


def pieces_of_row(plm: PlmConfig, row_tokens: int, update: int) -> int:
    """How many pieces of equal length a row is cut into in `update` (counted from 0); 1: it stays whole.

    Raises DistlmError when the length of that update does not divide `row_tokens`.
    """
    last = 0
    for tokens, updates in zip(plm.short_rows, plm.short_updates, strict=True):
        last += updates
        if update < last:
            return _divide(row_tokens, tokens)
    return 1


def check_short_rows(plm: PlmConfig, row_tokens: int) -> None:
    """Raises DistlmError when one of the lengths does not divide `row_tokens`."""
    for tokens in plm.short_rows:
        _divide(row_tokens, tokens)


def _divide(row_tokens: int, tokens: int) -> int:
    if row_tokens % tokens:
        raise DistlmError(f"plm.short_rows: {tokens} does not divide the shards' rows of {row_tokens} tokens")
    return row_tokens // tokens
