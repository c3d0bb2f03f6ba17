"""Parts of `make gpu-check` on the simulated device, by the command itself."""

import json
import subprocess
import sys
from pathlib import Path

from support import ENVIRONMENT, TESTS
from support.deadline import DEADLINE_S


def test_parts_on_the_simulated_device(sim: dict[str, str], tmp_path: Path) -> None:
    """`sim` says whether it can be compiled here. Speed is left out, and said to be."""
    assert sim
    command = [sys.executable, str(TESTS.parent / "benchmarks" / "gpu_check.py"), "--device", "sim"]
    done = subprocess.run(
        [*command, "--parts", "machine,memory,speed", "--out", str(tmp_path)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {part["part"]: part for part in json.loads((tmp_path / "gpu-check.json").read_text("utf-8"))["parts"]}
    assert [part["verdict"] for part in parts.values()] == ["ok", "ok", "skipped"]
    assert parts["machine"]["figures"]["device"] == "sim" and "GPU" in parts["speed"]["why"]
    assert parts["memory"]["figures"]["sums apart"] < 1e-5 and "lookup ms" not in parts["memory"]["figures"]
