"""Clocks: what passed on the wall, and what this process's threads worked; and the most memory that was used."""

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]
"""[2]: of the wall, and of the processor over all threads; other work on the machine disturbs the latter less."""


def clock(device: str = "cpu") -> Seconds:
    """Both clocks, once the device has done all that it was given."""
    if device != "cpu":
        import torch

        torch.accelerator.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def peak(device: str) -> float:
    """GB: of the process, or on a GPU of torch's allocator."""
    if device != "cpu":
        import torch

        return round(torch.accelerator.max_memory_allocated() / 1e9, 2)
    return round(own_peak() / 1e9, 2)


def own_peak() -> int:
    """Bytes: the largest resident set of this process since its program began (Linux).

    `ru_maxrss` is no less than that of the process that started this one: Python starts programs by vfork, and the
    kernel counts the memory that both have until then.
    """
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


class Best:
    """The best seconds of each name over several turns: other work on the machine only adds."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.processor: dict[str, float] = {}

    def keep(self, name: str, spent: Seconds, units: int = 1) -> None:
        """`spent` for `units`, e.g. tokens: seconds of one are kept."""
        for times, value in zip((self.wall, self.processor), spent, strict=True):
            one = float(value) / units
            times[name] = min(one, times.get(name, one))
