"""NT-ASGD (Merity et al. 2017, algorithm 1): SGD that turns into averaged SGD on a non-monotone validation loss."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

AVERAGE = "ax"
"""Name of the averages in the optimizer's state."""


class NTASGD(Optimizer):
    """SGD without momentum; from `start_averaging` on also the mean of its weights, kept beside them in fp32.

        g = gradient + weight_decay·w;   w −= lr·g;   ax += (w − ax)·μ

    As torch.optim.ASGD with t0 = 0 and lambd = 0: after k averaged steps μ was 1, 1, 1/2, 1/3 …, so ax is the mean of
    w_2 … w_k (of w_1 for k = 1). With `first_term` it is that of Algorithm 1, the mean of w_0 … w_k, where w_0 are the
    weights at the trigger: μ is 1/2, 1/3 …. SGD goes on from its own weights; the averages are only read.

    Each step uses the group's `lr`. With `reference_eta_lag` an averaged step, but for the first, uses that of the step
    before: torch's ASGD, once it has a state, reads a new lr only at the end of a step.
    Group entries `averaged` (−1: not averaging, else steps averaged) and `eta` are the whole scalar state. Elementwise,
    so it works on flat fp32 partitions.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        reference_eta_lag: bool = False,
        first_term: bool = False,
    ) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr={lr}, weight_decay={weight_decay}")
        self.reference_eta_lag, self.first_term = reference_eta_lag, first_term
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "averaged": -1, "eta": None})

    def start_averaging(self) -> None:
        """Begin a new mean: until the first step it is the present weights."""
        for group in self.param_groups:
            group["averaged"], group["eta"] = 0, None
            for parameter in group["params"]:
                self.state[parameter][AVERAGE] = parameter.detach().clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            averaging = group["averaged"] >= 0
            lagging = averaging and self.reference_eta_lag and group["eta"] is not None
            rate = float(group["eta"] if lagging else group["lr"])
            if group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            torch._foreach_add_(params, grads, alpha=-rate)
            if averaging:
                done = group["averaged"]
                self._average(params, 1 / (done + 2 if self.first_term else max(1, done)))
                group["averaged"] += 1
                group["eta"] = float(group["lr"])
        return loss

    def _average(self, params: list[Tensor], mu: float) -> None:
        averages = [self.state[parameter][AVERAGE] for parameter in params]
        if mu == 1:
            torch._foreach_copy_(averages, params)
            return
        change = torch._foreach_sub(params, averages)
        torch._foreach_mul_(change, mu)
        torch._foreach_add_(averages, change)


def trigger_fires(before: Sequence[float], loss: float, rule: Literal["masked", "window"], nonmono: int) -> bool:
    """Whether a validation loss is worse than the least of some of those `before` it, oldest first.

    masked: of all but the last `nonmono` (the authors' code); window: of the last `nonmono` (the arXiv text). Both
    need more than `nonmono` losses before, so with one validation per epoch and n = 5 the earliest is epoch 7.
    """
    if len(before) <= nonmono:
        return False
    return loss > min(before[:-nonmono] if rule == "masked" else before[-nonmono:])
