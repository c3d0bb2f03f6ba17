"""The gradient of the rows that were read and their update, in one pass over each row.

The version in torch is distlm.memory.values.rows, which copies the rows of three planes into a buffer and back; on
processors distlm.memory.values.kernels has this interface, too. Each program has some columns of one row for itself:
no atomics, and the same bits in every run and for every cut of the columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from distlm.kernels.bags import sum_of_bag
from distlm.kernels.launch import launch, tile


@triton.jit
def _noise(key, column):  # type: ignore[no-untyped-def]
    """32 bits from a row's key and the column's number, as distlm.memory.values.random.to_bf16 has them."""
    bits = (column.to(tl.uint32) * 0x9E3779B1).to(tl.uint32) ^ key
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B).to(tl.uint32)
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35).to(tl.uint32)
    return bits ^ (bits >> 16)


@triton.jit
def _widened(bits):  # type: ignore[no-untyped-def]
    """bf16 as int16 → fp32. As integers, because GPUs before the A100 know no bf16."""
    return ((bits.to(tl.int32) & 0xFFFF) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _narrowed(x, noise):  # type: ignore[no-untyped-def]
    """fp32 → bf16 as int16, up where `noise` (16 bits) exceeds what is missing to the upper one."""
    return ((x.to(tl.uint32, bitcast=True) + noise) >> 16).to(tl.int16)


@triton.jit
def _adam_rows(  # type: ignore[no-untyped-def]
    values, exp_avg, exp_avg_sq, squares,
    rows, source, index, weights, offsets, sizes, small, keys,
    scale, rest1, beta2, rest2, first_column, width, tiles,
    OWN: tl.constexpr, ROUNDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * TILE + tl.arange(0, TILE)
    valid = columns < width
    # Asked for before the gradient, which waits for reads of its own.
    place = tl.load(rows + row) * width + columns
    p = tl.load(values + place, mask=valid, other=0.0)
    m, v = tl.load(exp_avg + place, mask=valid, other=0), tl.load(exp_avg_sq + place, mask=valid, other=0)
    size, eps = tl.load(sizes + (row if OWN else 0)), tl.load(small + (row if OWN else 0))
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    g = sum_of_bag(source, index, weights, begin, end, width, columns, valid, TILE) * scale
    if ROUNDED:
        m, v = _widened(m), _widened(v)
    m = tl.fma(g - m, rest1, m)
    v = tl.fma(g * rest2, g, v * beta2)
    p = p - tl.div_rn(m * size, tl.sqrt_rn(v) + eps)
    tl.store(values + place, p, mask=valid)
    if ROUNDED:
        noise = _noise(tl.load(keys + row).to(tl.uint32), first_column + columns)
        tl.store(exp_avg + place, _narrowed(m, noise & 0xFFFF), mask=valid)
        tl.store(exp_avg_sq + place, _narrowed(v, noise >> 16), mask=valid)
    else:
        tl.store(exp_avg + place, m, mask=valid)
        tl.store(exp_avg_sq + place, v, mask=valid)
    tl.store(squares + row * tiles + part, tl.sum(g * g, axis=0))


def adam_rows(
    planes: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    bags: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
    betas: tuple[float, float],
    steps: tuple[Tensor, Tensor],
    rounding: tuple[Tensor, int],
) -> Tensor:
    """As distlm.memory.values.kernels.adam_rows, on the device of the planes: p ← p − s·m / (√v + e), in place.

    planes [K, d] contiguous: p fp32, m and v fp32 or bf16; rows int64 [U], each once; bags = (source fp32 [N, d], index
    int32 [n], weights fp32 [n], offsets int32 [U + 1]); steps = (s, e), fp32 [1] or [U]. Returns Σ g², fp64 [1].
    """
    source, index, weights, offsets = (x.contiguous() for x in bags)
    width = planes[0].shape[1]
    rounded = planes[1].dtype == torch.bfloat16
    moments: list[Any] = [plane.view(torch.int16) if rounded else plane for plane in planes[1:]]
    block = tile(width)
    tiles = triton.cdiv(width, block)
    squares = torch.empty(len(rows), tiles, device=rows.device)
    sizes, small = (x.contiguous() for x in steps)
    launch(
        _adam_rows, (len(rows), tiles), planes[0], planes[0], *moments, squares,
        rows, source, index, weights, offsets, sizes, small, rounding[0],
        float(scale), 1 - betas[0], betas[1], 1 - betas[1], rounding[1], width, tiles,
        OWN=len(sizes) > 1, ROUNDED=rounded, TILE=block, num_warps=2,
    )  # fmt: skip
    return squares.double().sum().view(1)
