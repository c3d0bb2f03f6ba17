"""Every kernel compiles for V100 and H100, without one: to machine code that keeps its numbers in registers."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT, TESTS

pytest.importorskip("triton", reason="triton is not installed (pip install -e '.[dev]' has it)")
KERNELS = {"_bag_sums", "_score_gradients", "_adam_rows", "_best_slots", "_log_probs", "_derive"}


@pytest.mark.slow
def test_machine_code(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    driver = TESTS / "support" / "drivers" / "compile_kernels.py"
    command = [sys.executable, str(driver), "70", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {(of, kernel) for of, kernel, _, _ in lines} == {(of, kernel) for of in ("70", "90") for kernel in KERNELS}
    for of, kernel, registers, spilled in lines:
        assert int(spilled) == 0 and int(registers) <= 128, (of, kernel)
