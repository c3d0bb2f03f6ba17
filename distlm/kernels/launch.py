"""How a kernel is started: on the device of its tensors, never with an empty grid."""

from typing import Any

import torch
from torch import Tensor

TILE = 256
"""Columns of a row that a program works on: 128 to 1,024 bytes that lie together, whatever the precision."""


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *arguments: Any, **constants: Any) -> None:
    """Start `kernel` for a grid of programs on the device of `on`.

    Products and sums are fused where the kernel says fma, and nowhere else: a compiler that chose by itself could
    choose otherwise for another width, and the bits of a column must not depend on the number of columns.
    """
    if 0 in grid:
        return
    # Triton starts on the current device, whatever device the tensors are on.
    with torch.cuda.device_of(on):
        kernel[grid](*arguments, enable_fp_fusion=False, **constants)


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number` (at least 1): blocks have such sizes."""
    return 1 << max(0, number - 1).bit_length()


def tile(width: int) -> int:
    """Columns of a program for rows of `width`."""
    return min(TILE, power_of_two(width))
