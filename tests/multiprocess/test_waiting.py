"""Ranks wait for one another for as long as it takes."""

import subprocess
import sys

import pytest
from support import ENVIRONMENT
from support.deadline import DEADLINE_S

pytestmark = pytest.mark.multiprocess

SCRIPT = """
import os, torch, torch.distributed as dist
from distlm.memory.values.exchange import Exchange
from distlm.runtime.ranks.rendezvous import WAIT, join_group
from distlm.runtime.ranks.world import resolve_world
join_group(resolve_world())
exchange = Exchange(2)
for group in (dist.group.WORLD, exchange._column_group, exchange._replica_group):
    assert group is None or group._get_backend(torch.device("cpu")).options._timeout == WAIT, group
assert (exchange._column_group is None) == (dist.get_world_size() == 2)
print("waits")
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_collective_gives_up_after_torchs_half_hour(ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
               "--no-python", sys.executable, "-c", SCRIPT]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("waits") == ranks
