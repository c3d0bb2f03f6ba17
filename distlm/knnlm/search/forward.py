"""Forward passes over evaluation blocks: what the search and the neural cache both need of every token of a split."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distlm.config.schema import KnnConfig
from distlm.data.blocks import BEGINS, Blocks, require_fit
from distlm.data.tokens import TokenFiles
from distlm.datastore.extract import Extracted, batches_of_hidden_states
from distlm.errors import DistlmError
from distlm.knnlm.search.cut import Cut
from distlm.models.card import model_fingerprint, model_of_card, read_model_card
from distlm.models.described import causal
from distlm.models.io import check_dictionary, load_model
from distlm.models.language_model import LanguageModel
from distlm.runtime.ranks.device import default_device
from distlm.runtime.stage import Stage


@dataclass(frozen=True)
class Forward:
    """Token files and the model that belongs to them."""

    knn: KnnConfig
    tokens: TokenFiles
    model: LanguageModel
    model_fingerprint: str
    longest: int
    """Tokens of one text that generation shows the model, the last ones: a block with its context, or as many as the
    model takes where its state is carried over."""


class TokenStates(NamedTuple):
    """Scored tokens of some blocks, in order."""

    queries: npt.NDArray[np.floating]
    """[q, D], in the keys' dtype: the hidden state that predicts each token."""
    targets: npt.NDArray[np.int32]
    """int32 [q]: the tokens."""
    log_probs: npt.NDArray[np.float64]
    """fp64 [q]: the language model's log-probability of each, in nats."""


def open_forward(stage: Stage) -> Forward:
    """Open and check token files and model. Raises DistlmError naming the two things that do not fit."""
    tokens = TokenFiles.open(stage.run.tokens(stage.config))
    checkpoint = stage.run.model_checkpoint(stage.config)
    model, _ = load_model(checkpoint, default_device())
    return forward_of(stage.config.knn, tokens, model, checkpoint)


def forward_of(knn: KnnConfig, tokens: TokenFiles, model: LanguageModel, checkpoint: Path) -> Forward:
    """Token files and a model that was read from `checkpoint`. Raises DistlmError when they do not fit, UsageError for
    blocks that are longer than the model can read."""
    card = read_model_card(checkpoint)
    check_dictionary(card, tokens.dictionary)
    longest = causal(model_of_card(card)).max_positions
    require_fit(knn.context_window, knn.block, longest, "knn.")
    seen = longest if knn.carry else knn.context_window + knn.block
    return Forward(knn, tokens, model, model_fingerprint(checkpoint), seen)


def token_states(
    forward: Forward,
    split: str,
    blocks: Blocks,
    units: Sequence[range],
    cut: Cut,
    tap: str,
    dtype: np.dtype[np.floating],
    before: npt.NDArray[np.float32] | None = None,
) -> Generator[TokenStates, None, None]:
    """Forward passes over units of blocks of a split; see states_of."""
    return states_of(forward, forward.tokens.split(split), f"split {split}", blocks, units, cut, tap, dtype, before)


def states_of(
    forward: Forward,
    ids: npt.NDArray[np.integer],
    what: str,
    blocks: Blocks,
    units: Sequence[range],
    cut: Cut,
    tap: str,
    dtype: np.dtype[np.floating],
    before: npt.NDArray[np.float32] | None = None,
) -> Generator[TokenStates, None, None]:
    """Forward passes over units of blocks of a text `ids` [tokens], called `what`: the states of one unit after the
    other. Close it when it is left early. `before` fp32 [blocks, S]: where the model's state is carried over
    (knn.carry), what it is before each block.

    Those of the next units are computed meanwhile, which keeps the threads busy where each is one pass. Raises
    DistlmError when the model's numbers are not finite, or do not fit `dtype`.
    """
    passes = [cut.passes(unit) for unit in units]
    every = (list(one) for of_unit in passes for one in of_unit)
    with closing(batches_of_hidden_states(forward.model, ids, blocks, every, tap, True, before)) as batches:
        for unit, of_unit in zip(units, passes, strict=True):
            yield _states(list(islice(batches, len(of_unit))), what, unit, dtype)


def _states(batches: list[Extracted], what: str, unit: range, dtype: np.dtype[np.floating]) -> TokenStates:
    with np.errstate(over="ignore"):
        queries = np.concatenate([batch.keys.float().cpu().numpy() for batch in batches]).astype(dtype)
    log_probs = np.concatenate([_log_probs(batch) for batch in batches])
    if not (np.isfinite(queries).all() and np.isfinite(log_probs).all()):
        raise DistlmError(
            f"{what}, blocks {unit[0]} to {unit[-1]}: the model gives infinite or undefined numbers; "
            "use another checkpoint, or datastore.key_dtype=float32 if hidden states exceed 65504"
        )
    targets = np.concatenate([batch.targets.cpu().numpy() for batch in batches]).astype(np.int32)
    return TokenStates(queries, targets, log_probs)


def context_rule(knn: KnnConfig, begins: bool = False) -> str:
    """The context rule in words, to be shown beside every perplexity; `begins`: the model's."""
    if knn.carry:
        return (
            "each split read in one go, the hidden state carried over; every token scored once, </s> and <unk> included"
        )
    window, block = knn.context_window, knn.block
    return (
        f"whole lines packed into blocks of at most {block} tokens, each block with up to {window} tokens before it"
        f"{BEGINS if begins else ''}; "
        "every token is scored once, </s> and <unk> included"
    )


def _log_probs(batch: Extracted) -> npt.NDArray[Any]:
    assert batch.log_probs is not None
    return batch.log_probs.cpu().numpy().astype(np.float64)
