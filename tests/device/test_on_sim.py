"""Every check that is marked for GPUs, on a device that is none: the simulated one of support.sim.

What needs CUDA itself (faiss-gpu, Triton, speed) is not here: `make test-gpu`.
"""

import os
import re
import subprocess
import sys

import pytest
from support import TESTS
from support.deadline import DEADLINE_S

CHECKS = {
    "memory": ["memory/test_device.py"],
    "masked models": ["models/plm/test_device.py"],
    "AWD-LSTM and lists": ["models/awd_lstm/test_model.py", "index/build/test_encode.py"],
    "trainings": ["device/test_stages.py", "-k", "fp16-zero2"],
    "all trainings": ["device/test_stages.py", "-k", "training or half"],
    "stages": ["device/test_stages.py", "-k", "not training and not half"],
    "offload": ["device/test_offload.py"],
    "other kinds": ["device/test_kinds.py"],
    "rules": ["device/test_rules.py"],
}
SLOW = ("masked models", "all trainings", "stages", "other kinds", "offload")
"""Minutes each. In the ordinary run a model with memories in half precision with ZeRO 2 on two ranks, stopped and
resumed, and the parts of `make gpu-check` (test_gpu_check.py) go through the same code."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CHECKS]
)
def test_checks_for_gpus(sim: dict[str, str], name: str) -> None:
    files = [str(TESTS / part) if part.endswith(".py") else part for part in CHECKS[name]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-rs", *files]
    done = subprocess.run(
        command, env={**os.environ, **sim}, cwd=TESTS.parent, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout) and "skipped" not in done.stdout, done.stdout
