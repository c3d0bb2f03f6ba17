"""Masks of a masked language model, keyed by (seed, epoch, row) and by nothing else.

Devlin et al. 2019, section 3.1: of the tokens predicted 80 % become [MASK], 10 % a random token, 10 % stay. Each token
is chosen for itself with the probability `share`, so the number chosen varies from row to row; special tokens and
padding are never chosen, nor drawn as replacements.
"""

import numpy as np
import numpy.typing as npt

from distlm.data.shards.records import Tokenizer

NO_LABEL = -100
"""Label of a token that is not predicted."""
MASKED, REPLACED = 0.8, 0.1
"""Shares of the chosen tokens that become [MASK], and a random token."""
_Words = npt.NDArray[np.uint64]
_WORD, _GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15
_CHOICE, _ACTION = 0x6A09E667F3BCC908, 0xBB67AE8584CAA73B


def mask_rows(
    tokens: npt.NDArray[np.integer],
    rows: npt.ArrayLike,
    epochs: npt.ArrayLike,
    seed: int,
    tokenizer: Tokenizer,
    share: float = 0.15,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(inputs [B, S], labels [B, S] with NO_LABEL where nothing is predicted), both int64.

    `tokens` [B, S]; `rows` their row numbers [B]; `epochs` of each row [B], or one for all (evaluation has its own,
    e.g. −1, so that its masks are fixed). What a token becomes depends on (seed, epoch, row, place in the row): not on
    the other rows, the ranks or the order.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share}")
    numbers = np.asarray(rows, np.int64).astype(np.uint64)
    key = _mix(np.full(len(numbers), seed & _WORD, np.uint64))
    key = _mix(key ^ np.broadcast_to(np.asarray(epochs, np.int64), numbers.shape).astype(np.uint64))
    key = _mix(key ^ numbers)
    ordinary = np.ones(tokenizer.vocabulary, bool)
    ordinary[list(tokenizer.special_ids)] = False
    steps = np.arange(1, tokens.shape[1] + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    words = _mix(_mix(key ^ np.uint64(_CHOICE))[:, None] + steps)
    chosen = (words < np.uint64(round(share * 2**64))) & ordinary[tokens]
    inputs = tokens.astype(np.int64)
    labels = np.where(chosen, inputs, NO_LABEL)
    row, place = np.nonzero(chosen)
    words = _mix(_mix(key ^ np.uint64(_ACTION))[row] + steps[place])
    action, draw = words >> np.uint64(32), words & np.uint64(2**32 - 1)
    masked = action < np.uint64(round(MASKED * 2**32))
    replaced = ~masked & (action < np.uint64(round((MASKED + REPLACED) * 2**32)))
    words_of_text = np.flatnonzero(ordinary)
    drawn = words_of_text[((draw * np.uint64(len(words_of_text))) >> np.uint64(32)).astype(np.int64)]
    inputs[row, place] = np.where(masked, tokenizer.mask, np.where(replaced, drawn, inputs[row, place]))
    return inputs, labels


def _mix(words: _Words) -> _Words:
    """The output function of SplitMix64 (Steele et al. 2014): a bijection of 64-bit words that scatters its input."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
