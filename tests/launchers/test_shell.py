"""bash reads every shell file that is shipped; tests/slurm/test_scripts.py runs every sbatch script on a real Slurm."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL = [*(ROOT / "slurm").glob("*.sbatch"), *(ROOT / "slurm").glob("*.sh"), *(ROOT / "tests" / "slurm").glob("*.sh"),
         ROOT / ".ci" / "run"]  # fmt: skip


def test_there_are_scripts_of_all_kinds() -> None:
    assert {path.suffix for path in SHELL} == {".sbatch", ".sh", ""}


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_bash_reads_it(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
