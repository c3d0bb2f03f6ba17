"""Compiled loops over the slots that an update reads, for processors: one pass over each row, without copies of it.

torch alone has to copy the rows of three planes into a buffer and back, which takes twice as long as the update. The
loops come from numba (an extra of this package); without it, and on GPUs, distlm.memory.values.rows does the same with
torch's operations, equal up to rounding. The bits depend neither on the number of threads nor on the columns.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

AVAILABLE = find_spec("numba") is not None
_BLOCK = 64
_BLOCKS_A_THREAD = 16


def usable(device: torch.device) -> bool:
    """Whether tensors of this device can be given to these functions."""
    return AVAILABLE and device.type == "cpu"


def bag_sums(source: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """As distlm.memory.lookup.bag_sums, with the bits that `adam_rows` computes on its way."""
    out = torch.empty(len(offsets) - 1, source.shape[1])
    arrays = [x.contiguous().numpy() for x in (out, source, index, weights, offsets)]
    loop = _compile(_sum_rows)
    _share(len(out), lambda first, last: loop(first, last, *arrays))
    return out


def adam_rows(
    planes: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    bags: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
    betas: tuple[float, float],
    steps: tuple[Tensor, Tensor],
) -> Tensor:
    """p ← p − s·m / (√v + e) after m ← m + (1 − β₁)(g − m), v ← β₂v + (1 − β₂)g² in the rows of (p, m, v), in place.

    planes fp32 [K, d] three times; rows int64 [U]; bags = (source, index, weights, offsets) as in SlotSums, whose sums
    times `scale` are g; steps = (s, e), fp32 [1] or [U]. Returns Σ g², fp64 [1].
    """
    source, index, weights, offsets = bags
    arrays = [x.contiguous().numpy() for x in (*planes, rows, source, index, weights, offsets, *steps)]
    numbers = [np.float32(x) for x in (scale, 1 - betas[0], betas[1], 1 - betas[1])]
    squares = torch.zeros(-(-len(rows) // _BLOCK), dtype=torch.float64)
    out = squares.numpy()
    loop = _compile(_adam_rows)
    _share(len(rows), lambda first, last: loop(first, last, out, *arrays, *numbers))
    return squares.sum().view(1)


def _share(rows: int, work: Callable[[int, int], object]) -> None:
    """work(first, last) for all rows, by as many threads as torch has; the cuts lie on whole blocks."""
    blocks = -(-rows // _BLOCK)
    threads = max(1, min(torch.get_num_threads(), blocks // _BLOCKS_A_THREAD))
    cuts = [blocks * i // threads * _BLOCK for i in range(threads)] + [rows]
    if threads == 1:
        work(0, rows)
        return
    # Not torch's own threads: a pool of a process that forked later has none.
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, cuts[i], cuts[i + 1]) for i in range(threads)]:
            done.result()


@cache
def _compile(loop: Callable[..., None]) -> Any:
    from numba import njit  # takes half a second

    try:
        return njit(loop, nogil=True, error_model="numpy", cache=True)
    except RuntimeError:  # There is no folder that compiled code can be kept in.
        return njit(loop, nogil=True, error_model="numpy")


def _sum_rows(first: int, last: int, out: Any, source: Any, index: Any, weights: Any, offsets: Any) -> None:
    for row in range(first, last):
        total = out[row]
        total[:] = 0
        for entry in range(offsets[row], offsets[row + 1]):
            given, weight = source[index[entry]], weights[entry]
            for j in range(len(total)):
                total[j] += weight * given[j]


def _adam_rows(
    first: int, last: int, squares: Any, values: Any, exp_avg: Any, exp_avg_sq: Any, rows: Any,
    source: Any, index: Any, weights: Any, offsets: Any, sizes: Any, eps: Any,
    scale: Any, rest1: Any, beta2: Any, rest2: Any,
) -> None:  # fmt: skip
    width = values.shape[1]
    gradient = np.zeros(width, np.float32)
    of_block = np.zeros(width, np.float32)
    own = len(sizes) > 1
    for begin in range(first, last, _BLOCK):
        of_block[:] = 0
        for row in range(begin, min(begin + _BLOCK, last)):
            gradient[:] = 0
            for entry in range(offsets[row], offsets[row + 1]):
                given, weight = source[index[entry]], weights[entry]
                for j in range(width):
                    gradient[j] += weight * given[j]
            slot = rows[row]
            p, m, v = values[slot], exp_avg[slot], exp_avg_sq[slot]
            size, small = (sizes[row], eps[row]) if own else (sizes[0], eps[0])
            for j in range(width):
                g = gradient[j] * scale
                mean = m[j] + rest1 * (g - m[j])
                square = v[j] * beta2 + g * g * rest2
                m[j] = mean
                v[j] = square
                p[j] -= mean * size / (np.sqrt(square) + small)
                of_block[j] += g * g
        total = 0.0
        for j in range(width):
            total += of_block[j]
        squares[begin // _BLOCK] = total
