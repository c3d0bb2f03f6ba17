"""What the device does at most, measured in the same run as what is compared with it; seconds of a piece of work."""

import statistics
import time
from collections.abc import Callable

import torch

from distlm.runtime.ranks.device import synchronize

WARM_UP = 3


def seconds_of(work: Callable[[], object], device: torch.device, turns: int = 10) -> float:
    """Median seconds of `work`, the device being waited for."""
    found = []
    for turn in range(WARM_UP + turns):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        if turn >= WARM_UP:
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def copy_rate(device: torch.device, mib: int = 2048) -> float:
    """Bytes a second, read and written together, of a copy of `mib` MiB: many times any cache."""
    source = torch.ones(mib << 18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype, side: int = 8192) -> float:
    """Floating-point operations a second of a product of two square matrices N(0, 1): zeros would be faster."""
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(one)
    return 2 * side**3 / seconds_of(lambda: torch.mm(one, other, out=out), device)
