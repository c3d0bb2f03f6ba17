"""How long the forward passes of a store are, where the settings leave it open (datastore.context_window, .block).

A pass over C context and B stored tokens computes (C + B) / B tokens for each stored one: with equal halves every token
is run twice. Left open, a pass is as long as the model takes, up to LONGEST, and an eighth of it is context: 8/7.
"""

from distlm.config.schema import RunConfig
from distlm.errors import DistlmError
from distlm.models.card import model_of_card, read_model_card
from distlm.models.described import causal, model_of
from distlm.runtime.rundir import RunDir

LONGEST = 2048
"""Tokens of a pass that is chosen here: beyond it attention costs more than a smaller share of context saves."""
_CONTEXT_SHARE = 8


def block_lengths(context_window: int, block: int, max_positions: int, longest: int = LONGEST) -> tuple[int, int]:
    """(context, stored) tokens of a pass, given datastore.context_window (−1: open) and datastore.block (0: open).

    What is given is kept; plan_store refuses what the model does not take. `longest`: tokens of a pass at most, but for
    a context that was asked for.
    """
    length = min(longest, max_positions)
    if block > 0:
        # The same share as of a whole pass: 1/7 of what is stored.
        least = max(1, block // (_CONTEXT_SHARE - 1))
        return context_window if context_window >= 0 else max(0, min(least, max_positions - block)), block
    window = context_window if context_window >= 0 else length // _CONTEXT_SHARE
    # A long context that was asked for is still not run through for fewer stored tokens than it has.
    return window, max(1, min(max(length, 2 * window), max_positions) - window)


def lengths_of(config: RunConfig) -> tuple[int, int]:
    """The same of a configuration. Raises DistlmError where its model must be asked and cannot be read."""
    store = config.datastore
    if store.context_window >= 0 and store.block > 0:
        return store.context_window, store.block
    try:
        described = model_of_card(read_model_card(RunDir.of(config).model_checkpoint(config)))
    except DistlmError:
        described = model_of(config)
    return block_lengths(store.context_window, store.block, causal(described).max_positions)
