"""The device of tests marked `gpu`: the accelerator that torch sees, be it CUDA's or `sim` (support.sim)."""

from typing import Any

import pytest

from distlm.runtime.ranks.device import accelerator
from support import warm

_FOUND = accelerator()
DEVICE = "" if _FOUND is None else _FOUND.type
"""Its kind; empty without one."""
NEEDS_DEVICE = [pytest.mark.gpu, pytest.mark.skipif(not DEVICE, reason="torch sees no accelerator")]
ON_DEVICE = pytest.param(DEVICE or "cuda", marks=NEEDS_DEVICE)
"""A parameter: the device."""
ON_PROCESSOR: dict[str, Any] = {"CUDA_VISIBLE_DEVICES": "", "SIM_DEVICES": "0", **warm.COLD}
"""Environment variables under which a child sees none (and is not forked from a process that does)."""
