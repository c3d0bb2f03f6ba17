"""What is minimised: a model with its loss, and for models that predict the next word cross-entropy plus a penalty of
Ton et al. on the key layer."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from distlm.models.language_model import LanguageModel


class Objective(nn.Module):
    """A model and what is minimised as one module, because DeepSpeed wraps a single forward."""

    model: nn.Module


class Pull(Protocol):
    """Where the tapped states of n tokens are pulled to."""

    def penalty(self, states: Tensor, reduction: str) -> Tensor:
        """states [n, D] → penalty of each token, summed or averaged over the width D: fp32 [n]."""


class Sums(NamedTuple):
    """Sums over the scored tokens of one batch: fp64 scalars. Gradients flow through `ce`, and `penalty` if ω > 0."""

    ce: Tensor
    """Σ −ln p(target), in nats."""
    penalty: Tensor
    """Σ ‖r‖², or Σ_i ‖Q_i − r‖² of the tokens' queues, summed or averaged over the width D; without ω."""
    norm: Tensor
    """Σ ‖r‖₂."""


class TrainModule(Objective):
    """The objective of a model that predicts the next word.

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
                penalty = pull.penalty(tapped, self.reduction)
            else:
                penalty = squares.mean(-1) if self.reduction == "mean" else squares.sum(-1)
        norm = squares.detach().sum(-1).sqrt()
        return Sums(ce, penalty.sum(dtype=torch.float64), norm.sum(dtype=torch.float64))

    def loss(self, sums: Sums, scale: float) -> Tensor:
        """fp32 scalar to differentiate: (Σ CE + ω Σ penalty) · scale."""
        total = sums.ce + self.weight * sums.penalty if self.weight > 0 else sums.ce
        return (total * scale).float()


def _select(states: Tensor, scored: Tensor | None) -> Tensor:
    """[B, T, D] → [n, D] of the scored positions."""
    return states.reshape(-1, states.shape[-1]) if scored is None else states[scored]
