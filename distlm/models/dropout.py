"""Dropout, and causal attention with dropout on its weights, that are not slow on a CPU."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 1 << 16


def dropout(hidden: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability `p` and scale the rest, from torch's global generator of the device.

    On a CPU `p` is rounded to 1/65536 and the scale is that of the rounded `p`, so the expectation is exact.
    """
    if not training or p == 0:
        return hidden
    if hidden.device.type != "cpu":
        return F.dropout(hidden, p)
    return apply_mask(hidden, *_mask(hidden.shape, p, hidden.dtype))


class PlainNoise:
    """Dropout at the places of a model, from torch's global generator: distlm.models.row_dropout.Noise without rows."""

    def __init__(self, rows: object = None, name: str = "") -> None:
        self.rows = None

    def __call__(self, hidden: Tensor, p: float, training: bool, place: str) -> Tensor:
        """hidden [B, ...] → the same shape."""
        return dropout(hidden, p, training)

    def of_tokens(self, hidden: Tensor, p: float, training: bool, place: str, chosen: Tensor | None = None) -> Tensor:
        """hidden [n, D] → the same shape."""
        return dropout(hidden, p, training)


def dropout_mask(shape: Sequence[int], p: float, like: Tensor) -> Tensor:
    """0 with probability `p`, else the scale 1 / (1 − p): a mask that several products share, in `like`'s dtype and
    device (fp32: in half precision the scale would be rounded); `p` and the generator as in `dropout`."""
    if like.device.type == "cpu":
        mask, scale = _mask(torch.Size(shape), p, like.dtype)
        return mask.mul_(scale)
    return like.new_empty(tuple(shape)).bernoulli_(1 - p).div_(1 - p)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, p: float, drop: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """q, k, v [B, heads, T, d] → [B, heads, T, d]: softmax(q·kᵀ/√d) v over the tokens up to one's own, with dropout
    `p` on the weights (0 outside training). `drop`: the dropout of weights [B, heads, T, T], where it is not torch's.

    Memory: [B, heads, T, T] on a CPU when p > 0, and with `drop`; elsewhere what torch's fused kernels need.
    """
    if p == 0 or (q.device.type != "cpu" and drop is None):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    rows, heads, tokens, width = q.shape
    future = (
        torch.full((tokens, tokens), -math.inf, dtype=q.dtype, device=q.device).triu_(1).expand(rows * heads, -1, -1)
    )
    q, k, v = (part.reshape(rows * heads, tokens, width) for part in (q, k, v))
    weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=width**-0.5).softmax(dim=2)
    if drop is None:
        weights = dropout(weights, p, True)
    else:
        weights = drop(weights.view(rows, heads, tokens, tokens)).view_as(weights)
    return (weights @ v).view(rows, heads, tokens, width)


def apply_mask(hidden: Tensor, mask: Tensor, scale: float) -> Tensor:
    """hidden·mask·scale, differentiable; mask of zeros and ones in the shape and dtype of hidden, overwritten.

    In half precision the scale is no factor of the mask, where it would be rounded (1 / 0.9 to 1.109 in bf16): the
    product is rounded once, as in torch's dropout.
    """
    if hidden.dtype in (torch.float16, torch.bfloat16):
        return (hidden * mask).mul_(scale)
    return hidden * mask.mul_(scale)


def _mask(shape: torch.Size, p: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """0 with probability p, else 1, on the CPU; and the scale 1 / (1 − p).

    torch draws its Bernoulli numbers one after the other, which takes a third of a training step; one 64-bit draw
    here serves four elements, for a sixth of the time.
    """
    kept = round((1 - p) * _STEPS)
    if kept == _STEPS:
        return torch.ones(shape, dtype=dtype), 1.0
    count = shape.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    mask = torch.lt(draws.view(shape), kept - _STEPS // 2, out=torch.empty(shape, dtype=dtype))
    return mask, _STEPS / max(kept, 1)
