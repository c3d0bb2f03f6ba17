"""Sequence-length warm-up by reshaping: the first updates of a fresh model see their rows cut into short pieces.

The tokens of an update, their order and their masks stay what they are without it; only how far attention reaches
changes, and with it the cost (Press et al. 2021, "Shortformer"; Li et al. 2022, "The Stability-Efficiency Dilemma").
"""

from distlm.errors import UsageError
from distlm.models.plm.config import PlmConfig, PlmTraining


def short_rows(plm: PlmConfig, train: PlmTraining, row_tokens: int) -> list[tuple[int, int]]:
    """(tokens of a piece, updates with such pieces), in order; none when the model is not fresh.

    A length of a whole row or more is a whole row. Raises DistlmError when a shorter one does not divide `row_tokens`.
    """
    if plm.init_from or plm.checkpoint or train.init_from:
        return []
    for tokens in plm.short_rows:
        if tokens < row_tokens and row_tokens % tokens:
            raise UsageError(
                f"plm.short_rows={plm.short_rows}: {tokens} does not divide the shards' rows of {row_tokens} tokens; "
                "name divisors, or set plm.short_rows=[] plm.short_updates=[]"
            )
    return [
        (min(tokens, row_tokens), updates) for tokens, updates in zip(plm.short_rows, plm.short_updates, strict=True)
    ]


def pieces_of_row(short: list[tuple[int, int]], row_tokens: int, update: int) -> int:
    """How many pieces of equal length a row is cut into in `update` (counted from 0); 1: it stays whole."""
    last = 0
    for tokens, updates in short:
        last += updates
        if update < last:
            return row_tokens // tokens
    return 1
