"""What an AWD-LSTM minimises: cross-entropy and the activation regularisation (AR, TAR) of Merity et al."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distlm.models.awd_lstm.lstm import State
from distlm.models.awd_lstm.model import AwdLstm, Columns
from distlm.training.objective import Objective


class StreamSums(NamedTuple):
    """Sums over the tokens of one chunk of some columns: fp64 scalars through which gradients flow."""

    ce: Tensor
    """Σ −ln p(target), in nats."""
    ar: Tensor
    """Σ mean over D of the square of the last layer's dropped output."""
    tar: Tensor
    """Σ mean over D of the square of the change of its raw output from the token before; none at a chunk's start."""


class StreamModule(Objective):
    """The AWD-LSTM's objective: mean CE + α·AR + β·TAR (Merity et al. section 4.6), where AR and TAR are means of
    squares as in the authors' code (the paper writes norms, the published α and β belong to the means)."""

    def __init__(self, model: AwdLstm, ar: float, tar: float) -> None:
        super().__init__()
        self.model: AwdLstm = model
        self.ar, self.tar = ar, tar

    def forward(
        self, words: Tensor, targets: Tensor, states: Sequence[State], columns: Columns | None = None
    ) -> tuple[StreamSums, list[State]]:
        """words, targets: int64 [T, B]; states before the first word → sums, and detached states after the last."""
        output = self.model.stream(words, states, columns)
        ce = self.model.cross_entropy(output.dropped, targets)
        ar = output.dropped.square().mean(-1).sum(dtype=torch.float64)
        tar = (output.raw[1:] - output.raw[:-1]).square().mean(-1).sum(dtype=torch.float64)
        return StreamSums(ce, ar, tar), [(h.detach(), c.detach()) for h, c in output.states]

    def loss(self, sums: StreamSums, tokens: int, columns: int, scale: float) -> Tensor:
        """fp32 scalar to differentiate; `tokens` and `columns` are those of the whole batch, T and B."""
        total = sums.ce / (tokens * columns)
        if self.ar:
            total = total + self.ar * sums.ar / (tokens * columns)
        if self.tar and tokens > 1:
            total = total + self.tar * sums.tar / ((tokens - 1) * columns)
        return (total * scale).float()
