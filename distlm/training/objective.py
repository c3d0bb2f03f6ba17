"""What is minimised: cross-entropy of the target words, plus a penalty of Ton et al. on the key layer, or the
activation regularisation (AR, TAR) of Merity et al."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distlm.models.awd_lstm.lstm import State
from distlm.models.awd_lstm.model import AwdLstm, Columns
from distlm.models.language_model import LanguageModel
from distlm.models.plm.model import Plm
from distlm.models.transformer.regularisers.penalty import Pull, pull_penalty


class Objective(nn.Module):
    """A model and what is minimised as one module, because DeepSpeed wraps a single forward."""

    model: nn.Module


class Sums(NamedTuple):
    """Sums over the scored tokens of one batch: fp64 scalars. Gradients flow through `ce`, and `penalty` if ω > 0."""

    ce: Tensor
    """Σ −ln p(target), in nats."""
    penalty: Tensor
    """Σ ‖r‖², or Σ_i ‖Q_i − r‖² of the tokens' queues, summed or averaged over the width D; without ω."""
    norm: Tensor
    """Σ ‖r‖₂."""


class TrainModule(Objective):
    """The objective of a transformer.

    Loss of Ton et al. eq. 2: Σ_j CE_j + ω Σ_j ‖r_j‖², where r_j is the tapped hidden state of token j; with the queues
    of the target words eq. 1: Σ_j CE_j + ω Σ_j Σ_i ‖sg(Q_i) − r_j‖².
    """

    def __init__(self, model: LanguageModel, tap: str, weight: float, reduction: str) -> None:
        """`weight` is ω; `reduction` ("mean" or "sum") over D; `tap` one of the model's."""
        super().__init__()
        self.model: LanguageModel = model
        self.tap, self.weight, self.reduction = tap, weight, reduction

    def forward(self, inputs: Tensor, targets: Tensor, scored: Tensor | None = None, pull: Pull | None = None) -> Sums:
        """Sums over the tokens whose `scored` is true.

        inputs, targets: int64 [B, T]; scored: bool [B, T], or None when all are (no gather is made then). pull: the
        queues of the scored tokens' targets, in their order; None: eq. 2.
        """
        output = self.model(inputs, tap=self.tap)
        assert output.hidden is not None and output.tapped is not None
        hidden, tapped = (_select(states, scored) for states in (output.hidden, output.tapped))
        wanted = targets.reshape(-1) if scored is None else targets[scored]
        ce = -self.model.log_probs(hidden, wanted).sum(dtype=torch.float64)
        # With ω = 0 the penalty is only looked at: the graph is that of plain training.
        with torch.set_grad_enabled(self.weight > 0 and torch.is_grad_enabled()):
            squares = tapped.float().square()
            if pull is not None:
                penalty = pull_penalty(tapped, pull, self.reduction)
            else:
                penalty = squares.mean(-1) if self.reduction == "mean" else squares.sum(-1)
        norm = squares.detach().sum(-1).sqrt()
        return Sums(ce, penalty.sum(dtype=torch.float64), norm.sum(dtype=torch.float64))

    def loss(self, sums: Sums, scale: float) -> Tensor:
        """fp32 scalar to differentiate: (Σ CE + ω Σ penalty) · scale."""
        total = sums.ce + self.weight * sums.penalty if self.weight > 0 else sums.ce
        return (total * scale).float()


class MaskedModule(Objective):
    """The masked language model's objective: mean CE over the tokens that are predicted."""

    def __init__(self, model: Plm) -> None:
        super().__init__()
        self.model: Plm = model

    def forward(self, tokens: Tensor, labels: Tensor, mask: Tensor, counted: Tensor, keys: Tensor | None) -> Tensor:
        """Σ CE over the labelled positions: fp64 scalar.

        tokens, labels int64 [B, T] (labels NO_LABEL elsewhere), mask and counted bool [B, T], keys int64 [B]: see Rows.
        """
        with self.model.rows.set(keys, mask, counted):
            return self.model.loss_sum(self.model(tokens), labels)

    def loss(self, total: Tensor, scale: float) -> Tensor:
        """fp32 scalar to differentiate: Σ CE · scale."""
        return (total * scale).float()


class StreamSums(NamedTuple):
    """Sums over the tokens of one chunk of some columns: fp64 scalars through which gradients flow."""

    ce: Tensor
    """Σ −ln p(target), in nats."""
    ar: Tensor
    """Σ mean over D of the square of the last layer's dropped output."""
    tar: Tensor
    """Σ mean over D of the square of the change of its raw output from the token before; none at a chunk's start."""


class StreamModule(Objective):
    """The AWD-LSTM's objective: mean CE + α·AR + β·TAR (Merity et al. section 4.5), where AR and TAR are means of
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


def _select(states: Tensor, scored: Tensor | None) -> Tensor:
    """[B, T, D] → [n, D] of the scored positions."""
    return states.reshape(-1, states.shape[-1]) if scored is None else states[scored]
