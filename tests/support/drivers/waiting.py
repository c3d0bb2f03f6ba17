"""How long the groups of these ranks wait for one another."""

import torch
import torch.distributed as dist

from distlm.memory.values.exchange import Exchange
from distlm.runtime.ranks.rendezvous import WAIT, join_group
from distlm.runtime.ranks.world import resolve_world

if __name__ == "__main__":
    join_group(resolve_world())
    exchange = Exchange(2)
    for group in (dist.group.WORLD, exchange._column_group, exchange._replica_group):
        assert group is None or group._get_backend(torch.device("cpu")).options._timeout == WAIT, group
    assert (exchange._column_group is None) == (dist.get_world_size() == 2)
    print("waits")
