"""Nesterov accelerated gradient, in the form that fairseq trains the WikiText-103 model with."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class NAG(Optimizer):
    """Nesterov momentum m that survives a changing learning rate (Bengio et al. 2012, eq. 7, in fairseq's form).

    fairseq keeps buf and corrects it by the rate of the step before:

        c = lr / lr_old;   p += m²·c·buf − (1 + m)·lr·g;   buf = m·c·buf − lr·g

    Its buffer is lr_old times a velocity v that knows no rate, which is what is kept here:

        v = m·v − g;   p += lr·(m·v − g)

    Both are the same numbers up to rounding. The second form needs no lr_old, so it stays right when one update
    calls `step` several times with a part of the parameters each (ZeRO-3 sub-groups), where lr_old would already
    hold the new rate after the first call, and a rate of 0 neither divides by zero nor loses the momentum.

    Weight decay is decoupled, p *= 1 − lr·weight_decay, before the step. Works on flat fp32 partitions: elementwise.
    Per parameter the state is `momentum_buffer` (v, fp32, shape of the parameter); each group records `lr_old`, the
    rate of its latest step, so that lr_old·v gives fairseq's buffer.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.99,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(f"lr={lr}, momentum={momentum}, weight_decay={weight_decay}")
        super().__init__(params, {"lr": lr, "lr_old": lr, "momentum": momentum, "weight_decay": weight_decay})

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
            lr, momentum = float(group["lr"]), group["momentum"]
            velocities = [self._velocity(p) for p in params]
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_sub_(velocities, grads)
            torch._foreach_add_(params, velocities, alpha=lr * momentum)
            torch._foreach_add_(params, grads, alpha=-lr)
            group["lr_old"] = lr
        return loss

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]
