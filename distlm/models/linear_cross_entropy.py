"""Softmax over a full vocabulary without [tokens, vocabulary]: a chunk of rows at a time, forward and backward.

The gradient of Σ CE is known as soon as a chunk's probabilities are, so it is formed there and then, and nothing of the
chunk is kept. Same products as the plain way (three per chunk), less memory traffic.
"""

from typing import Any

import torch
from torch import Tensor

_CHUNK = {"cpu": 1 << 24}
_CHUNK_DEFAULT = 1 << 27


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows n of a chunk: [n, V] fp32 is 64 MiB on a CPU and 512 MiB elsewhere, at least one row."""
    return max(1, _CHUNK.get(device.type, _CHUNK_DEFAULT) // vocabulary)


def cross_entropy_sum(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Σ −ln softmax(hidden·weightᵀ + bias)[target] over all rows: fp64 scalar.

    hidden [N, D], weight [V, D], bias [V], targets int64 [N]. Memory: one [n, V] of `chunk_rows`, and where gradients
    are wanted tensors of the sizes of hidden, weight and bias.
    """
    if torch.is_grad_enabled():
        total: Tensor = _CrossEntropySum.apply(hidden, weight, bias, targets)
        return total
    return -target_log_probs(hidden, weight, bias, targets).sum(dtype=torch.float64)


def target_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """ln p(target) of each row, fp32 [N]; shapes as in `cross_entropy_sum`. Without gradients: one [n, V] at a time."""
    parts = []
    rows = chunk_rows(len(weight), weight.device)
    for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = torch.addmm(bias, some, weight.t())
        chosen = logits.gather(1, wanted[:, None]).squeeze(1)
        parts.append((chosen - logits.logsumexp(1)).float())
    return torch.cat(parts) if parts else hidden.new_zeros(0)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        d_hidden, d_weight, d_bias = torch.empty_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        rows = chunk_rows(len(weight), weight.device)
        for first in range(0, len(hidden), rows):
            some, wanted = hidden[first : first + rows], targets[first : first + rows, None]
            scores = torch.addmm(bias, some, weight.t())
            top = scores.amax(1, keepdim=True)
            chosen = scores.gather(1, wanted) - top
            scores.sub_(top).exp_()
            norm = scores.sum(1, keepdim=True)
            total += (norm.log() - chosen).sum(dtype=torch.float64)
            scores.div_(norm)
            scores.scatter_add_(1, wanted, scores.new_full((1, 1), -1.0).expand(len(wanted), 1))
            torch.mm(scores, weight, out=d_hidden[first : first + rows])
            d_weight.addmm_(scores.t(), some)
            d_bias += scores.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0].to(ctx.saved_tensors[0].dtype)
        d_hidden, d_weight, d_bias = (tensor * scale for tensor in ctx.saved_tensors)
        return d_hidden, d_weight, d_bias, None
