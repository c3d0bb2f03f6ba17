"""A kernel beside torch on one problem: whether both give the same, and the time of each."""

import math
import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from distlm.kernels import choice
from distlm.kernels.choice import Operation
from distlm.runtime.ranks.device import empty_cache, synchronize
from distlm.training.kernels.problem import DTYPES, OF_SOFTMAX, Problem, Work, make

_SHARE = {torch.float16: 2.0**-6, torch.bfloat16: 2.0**-6, torch.float32: 1e-4, torch.float64: 1e-4}
"""How far results may differ, as a share of the largest: sums of half-precision logits round in another order."""
_REPEATS = 5


@dataclass(frozen=True)
class Compared:
    """What became of one operation on this rank."""

    operation: Operation
    equal: bool = False
    """The kernel gives what torch gives (whole numbers exactly), and the same bits twice."""
    difference: float = 0.0
    """Largest difference of any result, as a share of that result's largest number; slots that differ count as 1."""
    torch_seconds: float = 0.0
    """Of one call, the median of some; 0 where it failed."""
    triton_seconds: float = 0.0
    """The same of the kernel."""
    error: str = ""
    """What failed, in a few words."""

    @property
    def ratio(self) -> float:
        """How many times as fast the kernel is."""
        return self.torch_seconds / self.triton_seconds if self.triton_seconds else 0.0


def compare(operation: Operation, problem: Problem, device: torch.device, repeats: int = _REPEATS) -> Compared:
    """Do the operation on `device` by torch and by the kernel, in this process alone. Local.

    Afterwards torch does everything. On a processor Triton must be interpreted (TRITON_INTERPRET=1), and the times say
    nothing.
    """
    try:
        choice.take((), device)
        wanted, torch_seconds = _done(make(operation, problem, device), device, repeats)
        choice.take((operation,), device)
        found, triton_seconds = _done(make(operation, problem, device), device, repeats)
        again, _ = _done(make(operation, problem, device), device, 0)
        same = all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    except Exception as error:
        # Whatever a compiler, a driver or a full device says: the training goes on with torch.
        lines = str(error).strip().splitlines() or [""]
        return Compared(operation, error=f"{type(error).__name__}: {lines[0][:120]}".removesuffix(": "))
    finally:
        choice.take((), device)
        empty_cache()
    least = _SHARE[DTYPES[problem.precision]] if operation in OF_SOFTMAX else 0.0
    difference, near = _differ(found, wanted, least)
    return Compared(
        operation, near and same, difference, torch_seconds, triton_seconds, "" if same else "other bits each time"
    )


def _done(work: Work, device: torch.device, repeats: int) -> tuple[list[Tensor], float]:
    """Results of the first call, which may compile, and the median seconds of the calls after it."""
    found = [x.clone() for x in work()]
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        before = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - before)
    return found, median(seconds) if seconds else 0.0


def _differ(found: list[Tensor], wanted: list[Tensor], least: float) -> tuple[float, bool]:
    """The largest difference as Compared has it, and whether all are small enough; `least`: what always is."""
    most, near = 0.0, True
    for mine, theirs in zip(found, wanted, strict=True):
        if not mine.is_floating_point():
            share, allowed = float(not torch.equal(mine, theirs)), 0.0
        else:
            distance = (mine.double() - theirs.double()).abs().max()
            share = float(distance / theirs.double().abs().max().clamp(min=1e-30))
            share, allowed = math.inf if math.isnan(share) else share, max(least, _SHARE[mine.dtype])
        most, near = max(most, share), near and share <= allowed
    return most, near
