"""Batch norm of the queries: over the tokens of a micro-batch on all ranks, padding left out."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distlm.memory.values.exchange import Exchange

_EPS = 1e-5
# Numbers that are held in fp64 at a time: what fits a CPU's cache; elsewhere 64 MiB.
_CHUNK = {"cpu": 1 << 18}
_OTHER_CHUNK = 1 << 23


class QueryNorm(nn.Module):
    """torch.nn.BatchNorm1d(channels, eps 1e-5, affine) with a mask and with the tokens of all ranks (Lample et al.).

    Statistics of a micro-batch: count, Σx and Σx² in fp64, summed over the ranks, so that they do not depend on the
    number of ranks beyond fp64 rounding. One collective forward (2·channels + 1 numbers) and one backward (2·channels):
    in training every rank has to call both, whatever its mask. With fewer than two unmasked tokens on all ranks, or
    infinite or NaN values among them, the running statistics are used and stay as they are.

    `running_mean`, `running_var` (fp32 buffers [channels], the same bits on all ranks, variance unbiased) keep fp32
    when the module is cast. They are used in evaluation.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float, exchange: Exchange) -> None:
        super().__init__()
        self.momentum, self.exchange = momentum, exchange
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [T, C], mask bool [T] (true: counts in the statistics) → [T, C], fp32 whatever x is (fp64 for fp64).

        Masked tokens are normalised like the others. The gradient is the exact one: of `weight` and `bias` this rank's
        tokens' part (the trainer sums it over the ranks), of x the part of every rank's outputs, which all reach x
        through the statistics. Each rank's loss may carry a factor, as long as it is the same on all ranks.
        """
        if not self.training:
            return by_running_statistics(x, self.running_mean, self.running_var, self.weight, self.bias)
        mean, rstd, share = self._statistics(x.detach(), mask)
        normalised: Tensor = _Normalise.apply(x, mask, self.weight, self.bias, mean, rstd, share, self.exchange)
        return normalised

    @torch.no_grad()
    def _statistics(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and 1 / √(variance + ε), both [C]; and 1 / count [] (0 where the running statistics serve)."""
        channels = x.shape[1]
        sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
        for part, counts in _chunks(x, mask):
            # where, not a product: what stands in padding may be infinite.
            values = torch.where(counts[:, None], part, 0).double()
            sums[:channels] += values.sum(0)
            sums[channels:-1] += values.square_().sum(0)
        sums[-1] = mask.sum()
        sums = self.exchange.sum(sums, "norm")
        count = sums[-1]
        # A half-precision overflow is undone by the loss scaler; it must not stay in the running statistics.
        enough = (count >= 2) & sums.isfinite().all()
        mean = sums[:channels] / count.clamp(min=1)
        variance = (sums[channels:-1] / count.clamp(min=1) - mean * mean).clamp_(min=0)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        mean = torch.where(enough, mean, self.running_mean.double())
        variance = torch.where(enough, variance, self.running_var.double())
        self.running_mean.copy_(torch.where(enough, self.running_mean.double().lerp(mean, self.momentum), mean))
        newest = self.running_var.double().lerp(unbiased, self.momentum)
        self.running_var.copy_(torch.where(enough, newest, variance))
        share = torch.where(enough, 1 / count.clamp(min=1), 0.0)
        return mean.to(_exact(x)), (variance + _EPS).rsqrt().to(_exact(x)), share.to(_exact(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QueryNorm":
        before = self.running_mean, self.running_var
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = (
            now if now.dtype == old.dtype else old.to(now.device)
            for old, now in zip(before, (self.running_mean, self.running_var), strict=True)
        )
        return self


def by_running_statistics(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The norm in evaluation: x [T, C], the others [C] → [T, C], fp32 whatever x is (fp64 for fp64)."""
    mean, rstd = mean.to(_exact(x)), (variance + _EPS).rsqrt().to(_exact(x))
    return (x - mean) * (rstd * weight) + bias


class _Normalise(torch.autograd.Function):
    """y = x̂·weight + bias with x̂ = (x − mean)·rstd, and mean and rstd functions of the unmasked x of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, share: Tensor,
        exchange: Exchange,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, mask, weight, mean, rstd, share)
        ctx.exchange = exchange
        return torch.addcmul(bias.to(mean.dtype), x - mean, rstd * weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """∂x = weight·rstd·(g − [unmasked]/count·(Σg + x̂·Σg·x̂)), the sums over all tokens of all ranks."""
        (gradient,) = upstream
        x, mask, weight, mean, rstd, share = ctx.saved_tensors
        local = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
        for part, g in _chunks(x, gradient):
            local[0] += g.double().sum(0)
            local[1] += (g.double() * ((part - mean) * rstd)).sum(0)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            bias_sum, weight_sum = ctx.exchange.sum(local.clone(), "norm").to(mean.dtype)
            input_gradient = torch.empty_like(x)
            for part, g, counts, out in _chunks(x, gradient, mask, input_gradient):
                pull = torch.addcmul(bias_sum, (part - mean) * rstd, weight_sum)
                out.copy_((g - (counts * share)[:, None] * pull) * (rstd * weight))
        return input_gradient, None, local[1].to(weight.dtype), local[0].to(weight.dtype), None, None, None, None


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several tensors, a bounded number at a time."""
    rows = max(1, _CHUNK.get(first.device.type, _OTHER_CHUNK) // first.shape[1])
    return zip(first.split(rows), *(other.split(rows) for other in others), strict=True)
