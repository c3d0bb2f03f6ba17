"""Where kernels run in tests: compiled where CUDA is, else on the processor, by Triton's interpreter (conftest.py)."""

import os

import pytest
import torch

from distlm.kernels import choice

pytest.importorskip("triton", reason="triton is not installed (pip install -e '.[dev]' has it)")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a driver but no GPU: set TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def taking(monkeypatch: pytest.MonkeyPatch, *operations: choice.Operation) -> None:
    """For this test the kernels do these operations, and torch all others."""
    monkeypatch.setattr(choice, "_TAKEN", dict.fromkeys(operations, DEVICE.type))
