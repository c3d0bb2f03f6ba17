"""Ranks wait for one another for as long as it takes."""

import subprocess
import sys

import pytest
from support import ENVIRONMENT
from support.deadline import DEADLINE_S
from support.drivers import waiting as driver

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_collective_gives_up_after_torchs_half_hour(ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
               driver.__file__]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("waits") == ranks
