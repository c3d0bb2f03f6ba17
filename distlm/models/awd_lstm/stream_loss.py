"""Loss of an AWD-LSTM that reads a text in one go: the hidden state is carried from the first token to the last."""

import math

import numpy as np
import numpy.typing as npt
import torch

from distlm.data.blocks import require_ids
from distlm.models.awd_lstm.bptt import columns_of
from distlm.models.awd_lstm.model import AwdLstm
from distlm.training.engine import Engine, share
from distlm.training.validate import Validation, require_finite_loss


@torch.no_grad()
def stream_loss(model: AwdLstm, columns: npt.NDArray[np.integer], chunk: int) -> float:
    """Σ −ln p over tokens 1 … T−1 of each column: int [B, T], from the zero state, `chunk` tokens at a time (which
    bounds memory and changes the result only by rounding). The model is in eval mode; fp64."""
    rows, length = columns.shape
    device = model.embedding.device
    states = model.zero_states(rows)
    total = 0.0
    for first in range(0, length - 1, chunk) if rows else ():
        words = np.asarray(columns[:, first : min(first + chunk, length - 1) + 1], dtype=np.int64).T
        require_ids(words.ravel(), model.vocabulary)
        tokens = torch.from_numpy(np.ascontiguousarray(words)).to(device)
        output = model.stream(tokens[:-1], states)
        states = output.states
        total += float(model.cross_entropy(output.dropped, tokens[1:]))
    return total


class StreamValidator:
    """Scores the valid split in columns, as the authors' training does (10 columns), dealt to the ranks.

    The first token of each column has no context and is not scored, nor is the remainder; the mean is over the scored
    tokens (the authors divide by one more per column, which makes their number smaller by 0.01 to 0.03 in perplexity).
    """

    def __init__(self, ids: npt.NDArray[np.integer], columns: int, chunk: int) -> None:
        self.columns, self.chunk = columns_of(ids, columns, "awd.valid_batch", "valid"), chunk
        rows, length = self.columns.shape
        self.tokens = rows * (length - 1)
        self.rule = f"{rows} columns of {length} tokens, each read in one go from its second token"

    def run(self, engine: Engine, model: AwdLstm, rank: int, ranks: int) -> Validation:
        """Collective. Raises Diverged when the loss is not finite."""
        engine.eval()
        total = math.fsum(row[0] for row in share([stream_loss(model, self.columns[rank::ranks], self.chunk)]))
        engine.train()
        require_finite_loss(total)
        return Validation(total / self.tokens, self.tokens, self.rule)
