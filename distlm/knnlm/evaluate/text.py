"""Any text scored as `distlm knn evaluate` scores a split: the same blocks, batches, search and mixture."""

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distlm.data.blocks import eval_blocks
from distlm.errors import UsageError
from distlm.knnlm.evaluate.parts import Frozen
from distlm.knnlm.scoring import Floats, interpolate, knn_log_probs
from distlm.knnlm.search.carried import states_before
from distlm.knnlm.search.cut import planned_cut
from distlm.knnlm.search.forward import Forward, states_of
from distlm.knnlm.search.source import Source


@dataclass(frozen=True)
class TextScores:
    """Natural logarithms of the probability of each token of a text: fp64 [T]."""

    ids: npt.NDArray[np.int32]
    """int32 [T]: the tokens."""
    lm: Floats
    """Of the language model alone."""
    knn: Floats | None
    """Among the neighbours; −inf where the token was not among them. None without neighbours."""
    mixed: Floats | None
    """Of the mixture, with p_kNN = 0 where no neighbour is found; None without neighbours."""


def score_text(forward: Forward, ids: npt.NDArray[np.int32], tap: str, frozen: Frozen | None) -> TextScores:
    """Score the tokens `ids` [T] in evaluation blocks; the first token is read after </s>.

    As in `distlm knn evaluate`, a token without any neighbour has the mixture (1 − λ) p_LM; Generator.next_word, whose
    distribution sums to 1, has p_LM there.
    `forward` is a Source where λ, temperature and k are given in `frozen`. `tap`: any hidden state of the model, where
    there is no store to say which. Memory: a unit of blocks with its neighbours, and 24 bytes a
    token. Raises UsageError for an empty text, DistlmError for numbers of the model that are not finite.
    """
    if not len(ids):
        raise UsageError("the text has no tokens to score; give at least one word")
    blocks = eval_blocks(ids, forward.knn.context_window, forward.knn.block)
    dtype = forward.key_dtype if isinstance(forward, Source) else np.dtype(np.float32)
    lm, knn = [], []
    cut = planned_cut(len(blocks), forward.knn)
    units = cut.units(len(blocks))
    before = states_before(forward.model, ids, blocks) if forward.knn.carry else None
    with closing(states_of(forward, ids, "the text", blocks, units, cut, tap, dtype, before)) as states:
        for queries, targets, log_probs in states:
            lm.append(log_probs)
            if frozen is not None:
                assert isinstance(forward, Source)
                _, distances, values = forward.nearest(queries, max(forward.knn.k, frozen.k))
                knn.append(knn_log_probs(distances, values, targets, frozen.temperature, [frozen.k])[0])
    log_lm = np.concatenate(lm)
    if frozen is None:
        return TextScores(ids, log_lm, None, None)
    log_knn = np.concatenate(knn)
    return TextScores(ids, log_lm, log_knn, interpolate(log_lm, log_knn, frozen.weight))
