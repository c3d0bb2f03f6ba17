"""The choice of kernels of a training: at its first start by comparison, later as its checkpoints say."""

from collections.abc import Sequence
from typing import Literal

import torch

from distlm.errors import UsageError
from distlm.kernels import choice
from distlm.kernels.choice import OPERATIONS, Operation
from distlm.runtime.progress import say
from distlm.runtime.ranks.comm import Comm
from distlm.training.kernels.compare import Compared, compare
from distlm.training.kernels.problem import OF_MEMORY, Problem

MARGIN = 1.05
"""How many times as fast as torch a kernel must be: less is noise."""


def choose(
    setting: Literal["auto", "torch", "triton"],
    kept: Sequence[str] | None,
    problem: Problem,
    device: torch.device,
    comm: Comm,
) -> list[str]:
    """Take kernels for this process, the same on every rank, and return their operations. Collective.

    `kept`: those of the checkpoint that is continued, which `auto` keeps, so that a continued run gives the bits of one
    that was not stopped; None: there is none. On devices other than CUDA's nothing is taken. Raises UsageError for
    train.kernels=triton where it cannot be.
    """
    choice.take((), device)
    usable = device.type == "cuda" and choice.available()
    if setting == "triton" and not usable:
        missing = "there is no CUDA device" if device.type != "cuda" else "the package triton is not installed"
        raise UsageError(f"train.kernels=triton: {missing}; set it to auto")
    if setting == "torch" or device.type != "cuda":
        return []
    if setting == "auto" and kept is not None:
        if kept and not usable:
            say(f"kernels: triton is not installed; torch does {', '.join(kept)}, which it did so far", comm.rank)
            return []
        taken = [operation for operation in OPERATIONS if operation in kept]
    elif usable:
        wanted = [operation for operation in OPERATIONS if problem.memory or operation not in OF_MEMORY]
        of_ranks = comm.allgather([compare(operation, problem, device) for operation in wanted])
        taken = agreed(of_ranks, setting == "triton")
        say(told(of_ranks, taken), comm.rank)
    else:
        taken = []
    choice.take(taken, device)
    return [*taken]


def agreed(of_ranks: Sequence[Sequence[Compared]], slower: bool) -> list[Operation]:
    """The operations whose kernels are equal to torch on every rank and quicker on rank 0; `slower`: or not quicker."""
    return [
        first.operation
        for first, *others in zip(*of_ranks, strict=True)
        if all(found.equal for found in (first, *others)) and (slower or first.ratio >= MARGIN)
    ]


def told(of_ranks: Sequence[Sequence[Compared]], taken: Sequence[str]) -> str:
    """The choice in one line: which kernels, how many times as fast as torch, and why not the others."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    for found in zip(*of_ranks, strict=True):
        first = found[0]
        failed = next((one.error for one in found if one.error), "")
        differs = max(one.difference for one in found if not one.equal) if not all(x.equal for x in found) else 0.0
        note = failed or (f"differs by {differs:.1g}" if differs else f"{first.ratio:.2f} times as fast")
        parts[first.operation in taken].append(f"{first.operation} ({note})")
    by_triton, by_torch = ", ".join(parts[True]) or "nothing", ", ".join(parts[False]) or "nothing"
    return f"kernels: Triton does {by_triton}; torch does {by_torch}"
