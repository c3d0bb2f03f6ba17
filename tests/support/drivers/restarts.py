"""python restarts.py FOLDER N: ranks of torchrun that join, talk and end with 75, all of them N times, then with 0."""

import sys
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from distlm.errors import EXIT_STOPPED
from distlm.runtime.ranks.rendezvous import join_group
from distlm.runtime.ranks.world import resolve_world

if __name__ == "__main__":
    world = resolve_world()
    join_group(world)
    total = torch.tensor([world.rank + 1])
    dist.all_reduce(total)
    assert int(total) == world.size * (world.size + 1) // 2
    folder = Path(sys.argv[1])
    attempt = len(list(folder.glob(f"{world.rank}-*")))
    (folder / f"{world.rank}-{uuid.uuid4().hex}").touch()
    dist.barrier()
    if attempt < int(sys.argv[2]):
        sys.stderr.flush()
        # As a rank ends that was stopped: its group is closed in order.
        dist.destroy_process_group()
        sys.exit(EXIT_STOPPED)
    print("met", flush=True)
