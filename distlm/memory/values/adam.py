"""Adam for single rows: where ε is added, whose updates are counted, and what becomes of rows that are not read."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from distlm.memory.check import check_rule
from distlm.memory.config import MemoryConfig

_TAIL = 2.0**-30


@dataclass(frozen=True)
class Adam:
    """p ← p − s·m / (√v + e) after m ← m + (1 − β₁)(g − m), v ← β₂v + (1 − β₂)g², with s and e of the update number t.

    s = lr·√(1 − β₂ᵗ) / (1 − β₁ᵗ) in both forms. e = ε is torch's SparseAdam; e = ε·√(1 − β₂ᵗ) is Adam, which adds ε to
    the corrected √v̂ (Kingma & Ba 2015, algorithm 1).
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    corrected_eps: bool
    """Adam's ε instead of SparseAdam's."""

    @staticmethod
    def of(config: MemoryConfig) -> "Adam":
        """Raises UsageError naming the setting of `memory` that cannot work."""
        check_rule(config)
        beta1, beta2 = config.betas
        return Adam(config.lr, beta1, beta2, config.eps, config.optimizer == "adam")

    def steps(self, updates: Tensor) -> tuple[Tensor, Tensor]:
        """s and e, fp64, of update numbers of any shape."""
        updates = updates.double()
        root = (1 - self.beta2**updates).sqrt_()
        return self.lr * root / (1 - self.beta1**updates), self.eps * (root if self.corrected_eps else 1 + 0 * root)

    def apply_(self, values: Tensor, gradient: Tensor, m: Tensor, v: Tensor, update: int, steps: Tensor) -> None:
        """One update of rows, all fp32 [n, d], in one pass over them. steps: fp32 [] on their device, overwritten.

        torch's fused Adam adds its ε to √v / √(1 − β₂ᵗ): ε / √(1 − β₂ᵗ) there is SparseAdam's ε at √v.
        """
        eps = self.eps if self.corrected_eps else self.eps / math.sqrt(1 - self.beta2**update)
        steps.fill_(update - 1)
        adam(
            [values], [gradient], [m], [v], [], [steps], foreach=False, fused=True, amsgrad=False, maximize=False,
            beta1=self.beta1, beta2=self.beta2, lr=self.lr, weight_decay=0, eps=eps,
        )  # fmt: skip

    def apply_by_row_(self, values: Tensor, gradient: Tensor, m: Tensor, v: Tensor, updates: Tensor) -> None:
        """One update of rows, all fp32 [n or some more, d], that is each row's number `updates`, [n]."""
        rows = len(updates)
        values, gradient, m, v = values[:rows], gradient[:rows], m[:rows], v[:rows]
        sizes, eps = self.steps(updates[:, None])
        m.lerp_(gradient, 1 - self.beta1)
        v.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        values.sub_((m * sizes.float()).div_(v.sqrt().add_(eps.float())))

    def decays(self, updates: Tensor) -> tuple[Tensor, Tensor]:
        """β₁ and β₂ to the power of numbers of updates [n], fp32 [n, 1]."""
        updates = updates.double()[:, None]
        return (self.beta1**updates).float(), (self.beta2**updates).float()

    @property
    def replayed(self) -> int:
        """Missed updates that `drift` takes into account; 221 for the usual β.

        Term i is at most s·rⁱ·|m|/√v with r = β₁/√β₂ < 1. So those after it add up to less than 2⁻³⁰·s·|m|/√v, with
        the largest s among them (about lr).
        """
        ratio = self.beta1 / math.sqrt(self.beta2)
        return math.ceil(math.log(_TAIL * (1 - ratio)) / math.log(ratio)) if ratio > 0 else 0

    def drift(self, m: Tensor, v: Tensor, last: Tensor, missed: Tensor) -> Tensor:
        """How far dense Adam would have moved rows by updates last + 1 … last + missed, their gradients being zero.

        m, v fp32 [n, d] as update `last` left them; last, missed int32 [n], missed falling → fp32 [n, d], to be added.
        −m·Σᵢ sᵢβ₁ⁱ / (√(β₂ⁱv) + eᵢ), each term from one addition and one division; the terms after the first `replayed`
        are left out. Time: Σ missed·d.
        """
        terms = min(int(missed[0]), self.replayed) if len(missed) else 0
        number = torch.arange(1, terms + 1, device=m.device)[:, None]
        sizes, eps = self.steps(last + number)
        sizes = (sizes * (self.beta1 / math.sqrt(self.beta2)) ** number.double()).float()[..., None]
        eps = (eps / math.sqrt(self.beta2) ** number.double()).float()[..., None]
        root, total = v.sqrt(), torch.zeros_like(m)
        for term, rows in enumerate((missed >= number).sum(1).tolist()):
            total[:rows].addcdiv_(sizes[term, :rows], root[:rows] + eps[term, :rows])
        return total.mul_(m).neg_()
