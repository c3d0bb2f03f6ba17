"""Where a rank computes."""

import torch

from distlm.runtime.ranks.world import resolve_world


def default_device() -> torch.device:
    """This rank's GPU (local rank, modulo the GPUs it can see), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher that shows each rank only its own GPU leaves one device, whatever the local rank.
    return torch.device("cuda", resolve_world().local_rank % torch.cuda.device_count())
