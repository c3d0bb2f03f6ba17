"""Compiled loops over the slots that an update reads: one pass over each row, without copies of it.

torch alone has to copy the rows of three planes into a buffer and back, which takes twice as long as the update. For
processors the loops come from numba (an extra of this package), for GPUs from Triton (distlm.kernels), where that was
chosen; without them distlm.memory.values.rows does the same with torch's operations, equal up to rounding. The bits
depend neither on the number of threads nor on the columns.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distlm.kernels import choice

AVAILABLE = find_spec("numba") is not None
_BLOCKS_A_THREAD = 16


class Loops(NamedTuple):
    """The two that round alike: sums that are taken early, those of the norm and those of the update."""

    bag_sums: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    adam_rows: Callable[..., Tensor]


def loops_of(device: torch.device) -> Loops | None:
    """`bag_sums` and `adam_rows` for tensors of this device; None: by torch's operations."""
    if choice.taken("update", device):
        from distlm.kernels import adam, bags

        return Loops(bags.bag_sums, adam.adam_rows)
    return Loops(bag_sums, adam_rows) if AVAILABLE and device.type == "cpu" else None


def bag_sums(source: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """As distlm.memory.lookup.bag_sums, with the bits that `adam_rows` computes on its way."""
    from distlm.memory.values import loops

    out = torch.empty(len(offsets) - 1, source.shape[1])
    arrays = [x.contiguous().numpy() for x in (out, source, index, weights, offsets)]
    _share(len(out), lambda first, last: loops.sum_rows(first, last, *arrays))
    return out


def adam_rows(
    planes: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    bags: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
    betas: tuple[float, float],
    steps: tuple[Tensor, Tensor],
    rounding: tuple[Tensor, int],
) -> Tensor:
    """p ← p − s·m / (√v + e) after m ← m + (1 − β₁)(g − m), v ← β₂v + (1 − β₂)g² in the rows of (p, m, v), in place.

    planes [K, d]: p fp32, m and v fp32 or bf16; rows int64 [U]; bags = (source, index, weights, offsets) as in
    SlotSums, whose sums times `scale` are g; steps = (s, e), fp32 [1] or [U]; rounding = (keys int64 [U], first column)
    for the noise by which moments in bf16 are rounded, after the update has used them. Returns Σ g², fp64 [1].
    """
    from distlm.memory.values import loops

    source, index, weights, offsets = bags
    rounded = planes[1].dtype == torch.bfloat16
    moments = [plane.view(torch.uint16) if rounded else plane for plane in planes[1:]]
    arrays = [x.numpy() for x in (planes[0], *moments)]
    arrays += [x.contiguous().numpy() for x in (rows, source, index, weights, offsets, *steps)]
    numbers = [np.float32(x) for x in (scale, 1 - betas[0], betas[1], 1 - betas[1])]
    last_words = [rounding[0].numpy().astype(np.uint32), rounding[1]] if rounded else []
    loop = loops.adam_rows_bf16 if rounded else loops.adam_rows
    squares = torch.zeros(-(-len(rows) // loops.BLOCK), dtype=torch.float64)
    out = squares.numpy()
    _share(len(rows), lambda first, last: loop(first, last, out, *arrays, *numbers, *last_words))
    return squares.sum().view(1)


def _share(rows: int, work: Callable[[int, int], object]) -> None:
    """work(first, last) for all rows, by as many threads as torch has; the cuts lie on whole blocks."""
    from distlm.memory.values.loops import BLOCK

    blocks = -(-rows // BLOCK)
    threads = max(1, min(torch.get_num_threads(), blocks // _BLOCKS_A_THREAD))
    cuts = [blocks * i // threads * BLOCK for i in range(threads)] + [rows]
    if threads == 1:
        work(0, rows)
        return
    # Not torch's own threads: a pool of a process that forked later has none.
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, cuts[i], cuts[i + 1]) for i in range(threads)]:
            done.result()
