"""Evaluation of an AWD-LSTM: each split is read in one go, the hidden state carried over."""

import numpy as np

from distlm.data.dictionary import Dictionary
from distlm.data.tokens import TokenFiles
from distlm.models.awd_lstm.model import AwdLstm
from distlm.models.awd_lstm.stream_loss import stream_loss
from distlm.models.language_model import LanguageModel
from distlm.runtime.stage import Stage
from distlm.training.evaluate import COUNTED, evaluate_splits

RULE = f"each split read in one go, the hidden state carried over; {COUNTED}"
_CHUNK = 256
"""Tokens in one pass; the result does not depend on it."""


def evaluate_in_one_go(stage: Stage) -> dict[str, float]:
    """Perplexity per word of every split of knn.splits; see evaluate_splits. A text read in one go is no work for
    several ranks."""
    return evaluate_splits(stage, _score)


def _score(model: LanguageModel, tokens: TokenFiles, split: str) -> tuple[float, str]:
    assert isinstance(model, AwdLstm)
    ids = tokens.split(split)
    return stream_loss(model, np.concatenate([[Dictionary.EOS], ids])[None], _CHUNK) / len(ids), RULE
