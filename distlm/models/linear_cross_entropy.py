"""Softmax over a full vocabulary without [tokens, vocabulary]: a chunk of rows at a time, forward and backward.

The gradient of Σ CE is known as soon as a chunk's probabilities are, so it is formed there and then, and nothing of the
chunk is kept. Same products as the plain way (three per chunk), less memory traffic.

On GPUs a kernel (distlm.kernels.softmax) does what stands between the products, where that was chosen.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlm.kernels import choice

_CHUNK = {"cpu": 1 << 24}
_CHUNK_DEFAULT = 1 << 27


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows n of a chunk: [n, V] fp32 is 64 MiB on a CPU and 512 MiB elsewhere, at least one row."""
    return max(1, _CHUNK.get(device.type, _CHUNK_DEFAULT) // vocabulary)


def cross_entropy_sum(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Σ −ln softmax(hidden·weightᵀ + bias)[target] over all rows: fp64 scalar.

    hidden [N, D], weight [V, D], bias [V], targets int64 [N]. Softmax is computed in fp32 where those are of half
    precision. Memory: one [n, V] of `chunk_rows`, and where gradients are wanted tensors of the sizes of hidden, weight
    and bias.
    """
    if torch.is_grad_enabled():
        total: Tensor = _CrossEntropySum.apply(hidden, weight, bias, targets)
        return total
    return -target_log_probs(hidden, weight, bias, targets).sum(dtype=torch.float64)


def target_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """ln p(target) of each row, fp32 [N]; shapes and memory as in `cross_entropy_sum`, [n, V] alone."""
    parts = []
    rows = chunk_rows(len(weight), weight.device)
    for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = torch.addmm(bias, some, weight.t())
        if _by_kernel("cross_entropy", logits) and not logits.requires_grad:
            parts.append(_kernel().log_probs(logits, wanted)[0])
            continue
        for part, some_wanted in _parts(logits, wanted):
            scores = part.to(_exact(part))
            chosen = scores.gather(1, some_wanted[:, None]).squeeze(1)
            parts.append((chosen - scores.logsumexp(1)).float())
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def linear_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """ln softmax(hidden·weightᵀ)[target] of each row, fp32 [N], differentiable: whatever the rows' own weights are.

    hidden [N, D], weight [V, D], targets int64 [N]. Memory: [N, V] logits and their fp32 log-softmax, and in the
    backward as much again; by the kernel one [n, V] of `chunk_rows`, whose products the backward makes a second time.
    """
    if _by_kernel("log_probs", hidden) and not torch.is_autocast_enabled(hidden.device.type):
        found: Tensor = _LinearLogProbs.apply(hidden, weight, targets)
        return found
    log_softmax = torch.log_softmax(F.linear(hidden, weight), dim=1, dtype=torch.float32)
    return -F.nll_loss(log_softmax, targets, reduction="none")


def _by_kernel(operation: choice.Operation, x: Tensor) -> bool:
    return choice.taken(operation, x.device) and x.dtype != torch.float64


def _kernel() -> Any:
    # It imports triton.
    from distlm.kernels import softmax

    return softmax


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found, norms = (torch.empty(len(hidden), device=hidden.device) for _ in range(2))
        for rows in _chunks(hidden, weight):
            found[rows], norms[rows] = _kernel().log_probs(hidden[rows] @ weight.t(), targets[rows])
        ctx.save_for_backward(hidden, weight, targets, norms)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, targets, norms = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in _chunks(hidden, weight):
            scores = hidden[rows] @ weight.t()
            _kernel().derive_(scores, targets[rows], norms[rows], -upstream[0][rows])
            torch.mm(scores, weight, out=d_hidden[rows])
            d_weight.addmm_(scores.t(), hidden[rows])
        return d_hidden, d_weight, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = chunk_rows(len(weight), weight.device)
    return [slice(first, first + rows) for first in range(0, len(hidden), rows)]


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        d_hidden, d_weight, d_bias = torch.empty_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for rows in _chunks(hidden, weight):
            some, wanted = hidden[rows], targets[rows]
            scores = torch.addmm(bias, some, weight.t())
            if _by_kernel("cross_entropy", scores):
                total -= _kernel().log_probs(scores, wanted, derive=True)[0].sum(dtype=torch.float64)
            else:
                total += _derive_(scores, wanted[:, None])
            torch.mm(scores, weight, out=d_hidden[rows])
            d_weight.addmm_(scores.t(), some)
            d_bias += scores.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0].to(ctx.saved_tensors[0].dtype)
        d_hidden, d_weight, d_bias = (tensor * scale for tensor in ctx.saved_tensors)
        return d_hidden, d_weight, d_bias, None


def _exact(logits: Tensor) -> torch.dtype:
    """What softmax is computed in: a sum over a vocabulary, and its logarithm, do not fit half precision."""
    return torch.promote_types(logits.dtype, torch.float32)


def _parts(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [n, V] and targets [n, ...] of some rows at a time: all, or in half precision so few that the logits and a
    copy of these in fp32 need no more memory than logits in fp32 would."""
    rows = len(logits) if logits.dtype == _exact(logits) else max(1, len(logits) // 4)
    return zip(logits.split(rows), targets.split(rows), strict=True)


def _derive_(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [n, V] become the derivatives of Σ −ln p(target), which is returned, fp64 []; targets int64 [n, 1]."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, wanted in _parts(logits, targets):
        scores = part.to(_exact(part))
        total += _derive_exact_(scores, wanted)
        if scores is not part:
            part.copy_(scores)
    return total


def _derive_exact_(scores: Tensor, targets: Tensor) -> Tensor:
    """The same of logits that are of no half precision."""
    top = scores.amax(1, keepdim=True)
    chosen = scores.gather(1, targets) - top
    scores.sub_(top).exp_()
    norm = scores.sum(1, keepdim=True)
    total = (norm.log() - chosen).sum(dtype=torch.float64)
    scores.div_(norm)
    scores.scatter_add_(1, targets, scores.new_full((1, 1), -1.0).expand(len(targets), 1))
    return total
