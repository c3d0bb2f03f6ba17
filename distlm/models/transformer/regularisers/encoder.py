"""The momentum encoder of He et al. (2020), eq. 2: a copy of the model that follows it slowly."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from distlm.models.language_model import LanguageModel


class MomentumEncoder:
    """θ' ← m θ' + (1 − m) θ after every update; θ' = θ at first. fp32 on every rank, without dropout.

    It computes in fp32 whatever train.precision says: what overflowed once would stay in its word's queue.
    """

    def __init__(self, model: LanguageModel, tap: str, momentum: float, device: torch.device) -> None:
        """model: before DeepSpeed has it, fp32. The copy leaves it and torch's random generator as they are."""
        self.tap, self.momentum = tap, momentum
        self.model = copy.deepcopy(model).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def states(self, inputs: Tensor, scored: Tensor | None) -> Tensor:
        """inputs int64 [B, T] → the tapped states of the scored tokens (bool [B, T]; None: all): fp32 [n, D]."""
        tapped = self.model(inputs, tap=self.tap, stop_at_tap=True).tapped
        return tapped.flatten(0, 1) if scored is None else tapped[scored]

    @torch.no_grad()
    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """weights: parameter name → the model's tensor, of any precision."""
        for name, parameter in self.model.named_parameters():
            parameter.mul_(self.momentum).add_(weights[name].to(parameter), alpha=1 - self.momentum)
