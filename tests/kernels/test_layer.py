"""A memory that trains by all kernels together, beside the same by torch."""

import pytest
import torch
from support.kernels import DEVICE, taking
from torch import Tensor

from distlm.kernels.choice import OPERATIONS
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.values import kernels
from distlm.memory.values.optimizer import SparseValueOptimizer


def trained() -> list[Tensor]:
    """Outputs of two updates, the last gradients, and the values with their moments."""
    memory = ProductKeyMemory(12, sub_keys=6, heads=2, k=3, key_width=8, seed=1, layer=1).to(DEVICE)
    values = SparseValueOptimizer(memory, lr=0.01, form="adam", moments="bf16", clip_norm=0.5)
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for _ in range(2):
        x, upstream = (torch.randn(4, 12, generator=generator).to(DEVICE) for _ in range(2))
        memory.zero_grad()
        out = memory(x)
        out.backward(upstream)
        values.step()
        values.zero_grad()
        found.append(out.detach())
    found += [parameter.grad for parameter in memory.parameters() if parameter.grad is not None]
    return [*found, *(plane.float() for plane in memory.table.planes())]


def test_all_kernels_train_what_torch_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    wanted = trained()
    taking(monkeypatch, *OPERATIONS)
    found = trained()
    assert len(found) == len(wanted) == 2 + 5 + 3
    for mine, theirs in zip(found, wanted, strict=True):
        # Moments are kept in bf16.
        torch.testing.assert_close(mine, theirs, rtol=2.0**-6, atol=1e-5)
