"""The scripts of docs/pkm.md in which a memory is a part of somebody's own model, word for word."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import BIN, ENVIRONMENT

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pkm.md"
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def run(folder: Path, script: str, *launcher: str) -> str:
    (folder / "script.py").write_text(script, "utf-8")
    done = subprocess.run(
        [*(launcher or [sys.executable]), "script.py"],
        cwd=folder, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Torch's own threads warn of what a busy machine does to them; this is for what our calls are told.
    assert "FutureWarning" not in done.stderr and "UserWarning" not in done.stderr, done.stderr
    return done.stdout


def test_alone(tmp_path: Path) -> None:
    found = re.fullmatch(r"loss (\S+), slots in use (\d+)%\n", run(tmp_path, SCRIPTS[0]))
    # Of random targets, whose mean square is 1, a Linear alone learns next to nothing.
    assert found and float(found[1]) < 0.9 and int(found[2]) > 50
    saved = torch.load(tmp_path / "block.pt")
    assert saved["model"]["memory.table.values"].shape == (1024, 64)
    assert saved["values"]["state"][0]["exp_avg"].shape == (1024, 64)


@pytest.mark.multiprocess
def test_on_two_ranks(tmp_path: Path) -> None:
    found = run(tmp_path, SCRIPTS[1], str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2")
    assert sorted(re.findall(r"rank .*?\]", found)) == [f"rank {rank}: values [1024, 32]" for rank in range(2)], found
    states = [torch.load(tmp_path / f"block-{rank}.pt") for rank in range(2)]
    assert [state["1.table.columns"].tolist() for state in states] == [[0, 32, 64], [32, 64, 64]]
