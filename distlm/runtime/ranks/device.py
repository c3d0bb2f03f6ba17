"""Where a rank computes: the one place that asks for a device, so that another vendor's needs no other line.

torch.accelerator names it: CUDA (NVIDIA, and AMD under ROCm), XPU, or the device of a package that brings one. Apple's
MPS is passed over: it has no fp64, in which perplexities are summed.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from distlm.runtime.ranks.world import World, resolve_world

if TYPE_CHECKING:
    import torch

DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/kfd"))
"""There where the driver of NVIDIA or AMD is."""


def accelerator() -> torch.device | None:
    """The kind of device beside the processor, without an index; None where there is none."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None or found.type == "mps" else found


def may_have_accelerator() -> bool:
    """Whether asking torch is worth the seconds that loading it takes."""
    return any(path.exists() for path in DRIVERS) or bool(entry_points(group="torch.backends"))


def default_device(world: World | None = None) -> torch.device:
    """This rank's device (local rank, modulo the devices it can see), or the processor where there is none."""
    import torch

    found = accelerator()
    if found is None:
        return torch.device("cpu")
    # A launcher that shows each rank only its own GPU leaves one device, whatever the local rank.
    return torch.device(found.type, (world or resolve_world()).local_rank % torch.accelerator.device_count())


def group_backend() -> str:
    """Backends of torch.distributed: gloo for the processor, and beside it the device's own (CUDA: NCCL)."""
    import torch.distributed as dist

    found = accelerator()
    return "gloo" if found is None else f"cpu:gloo,{found.type}:{dist.get_default_backend_for_device(found)}"


def empty_cache() -> None:
    """Give back what torch's allocator keeps of freed memory on the device."""
    import torch

    if accelerator() is not None:
        torch.accelerator.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked of `device`; the processor has done it already."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
