"""What stands between the products of a linear layer's cross-entropy: rows of logits → ln p(target) and derivatives.

The version in torch, in distlm.models.linear_cross_entropy, reads and writes the logits eight times. Here they are read
once and overwritten once by their derivatives; the second reading finds a row in the cache. The products stay torch's:
its libraries have them at the speed of the device, on a V100 too, for which Triton makes no matrix instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distlm.kernels.launch import launch, power_of_two

_BLOCK = 4096


@triton.jit
def _log_probs(logits, targets, log_probs, norms, classes, DERIVE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * classes
    target = tl.load(targets + row)
    # Before the reductions, which all threads wait in: afterwards other threads may have overwritten it.
    known = (target >= 0) & (target < classes)
    chosen = tl.load(start + target, mask=known, other=float("nan")).to(tl.float32)
    top, total = -float("inf"), 0.0
    for first in range(0, classes, BLOCK):
        place = first + tl.arange(0, BLOCK)
        x = tl.load(start + place, mask=place < classes, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), axis=0)
        top = new
    norm = top + tl.log(total)
    tl.store(norms + row, norm)
    tl.store(log_probs + row, chosen - norm)
    if DERIVE:
        for first in range(0, classes, BLOCK):
            place = first + tl.arange(0, BLOCK)
            x = tl.load(start + place, mask=place < classes, other=0.0).to(tl.float32)
            derived = tl.exp(x - norm) - tl.where(place == target, 1.0, 0.0)
            tl.store(start + place, derived.to(logits.dtype.element_ty), mask=place < classes)


@triton.jit
def _derive(logits, targets, norms, factors, classes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target, norm, factor = tl.load(targets + row), tl.load(norms + row), tl.load(factors + row).to(tl.float32)
    start = logits + row * classes
    x = tl.load(start + place, mask=place < classes, other=0.0).to(tl.float32)
    derived = (tl.exp(x - norm) - tl.where(place == target, 1.0, 0.0)) * factor
    tl.store(start + place, derived.to(logits.dtype.element_ty), mask=place < classes)


def log_probs(logits: Tensor, targets: Tensor, derive: bool = False) -> tuple[Tensor, Tensor]:
    """ln softmax(logits)[target] and ln Σ exp(logits) of each row, fp32 [n]; computed in fp32.

    logits [n, c] contiguous, of any precision up to fp32; targets int64 [n], of which one that is no class gives NaN.
    derive: the logits are overwritten by the derivatives of −ln p, softmax − 1 at the target.
    """
    rows, classes = logits.shape
    found, norms = (torch.empty(rows, device=logits.device) for _ in range(2))
    block = min(_BLOCK, power_of_two(classes))
    arguments = logits, targets.contiguous(), found, norms, classes
    launch(_log_probs, (rows,), logits, *arguments, DERIVE=derive, BLOCK=block, num_warps=8)
    return found, norms


def derive_(logits: Tensor, targets: Tensor, norms: Tensor, factors: Tensor) -> None:
    """Overwrite logits [n, c] by factor·(softmax − 1 at the target), norms fp32 [n] as `log_probs` gave them, factors
    [n]."""
    rows, classes = logits.shape
    block = min(_BLOCK, power_of_two(classes))
    arguments = logits, targets.contiguous(), norms, factors.contiguous(), classes
    launch(_derive, (rows, triton.cdiv(classes, block)), logits, *arguments, BLOCK=block, num_warps=8)
