"""Weighted sums of rows, bag by bag, and the derivatives of their weights.

The versions in torch are distlm.memory.lookup.bag_sums and score_gradients. Against those on a GPU: tables of any
precision, gradients that need not be fp32, and no sort of the slots before the derivatives.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distlm.kernels.launch import launch, power_of_two, tile

_READS = 16
"""Reads of a token that are worked on together in `score_gradients`."""
_COLUMNS = 128


@triton.jit
def sum_of_bag(source, index, weights, begin, end, width, columns, valid, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ of weight·source row over the entries begin … end, some columns of it, fp32: one entry after the other.

    Rows are asked for eight at a time, so that a bag of thousands does not wait for each. Entries behind the end add
    0·0, which changes no sum that began at 0.
    """
    total = tl.zeros([TILE], dtype=tl.float32)
    for first in range(begin, end, 8):
        for step in tl.static_range(8):
            there = first + step < end
            row = tl.load(index + first + step, mask=there, other=0).to(tl.int64)
            weight = tl.load(weights + first + step, mask=there, other=0.0).to(tl.float32)
            given = tl.load(source + row * width + columns, mask=valid & there, other=0.0).to(tl.float32)
            total = tl.fma(given, weight, total)
    return total


@triton.jit
def _bag_sums(source, index, offsets, weights, out, width, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    valid = columns < width
    begin, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    total = sum_of_bag(source, index, weights, begin, end, width, columns, valid, TILE)
    tl.store(out + bag * width + columns, total, mask=valid)


@triton.jit
def _score_gradients(  # type: ignore[no-untyped-def]
    table, slots, gradient, out, reads, width, READS: tl.constexpr, TILE: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    read = tl.program_id(1) * READS + tl.arange(0, READS)
    there = read < reads
    rows = tl.load(slots + token * reads + read, mask=there, other=0).to(tl.int64)
    products = tl.zeros([READS, TILE], dtype=tl.float32)
    for first in range(0, width, TILE):
        columns = first + tl.arange(0, TILE)
        valid = columns < width
        given = tl.load(gradient + token * width + columns, mask=valid, other=0.0).to(tl.float32)
        both = there[:, None] & valid[None, :]
        values = tl.load(table + rows[:, None] * width + columns[None, :], mask=both, other=0.0).to(tl.float32)
        products = tl.fma(values, tl.broadcast_to(given[None, :], [READS, TILE]), products)
    tl.store(out + token * reads + read, tl.sum(products, axis=1), mask=there)


def bag_sums(source: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """As distlm.memory.lookup.bag_sums, of a source of any precision, contiguous [N, d]. A column's bits depend neither
    on the other columns nor on the other bags."""
    bags, width = len(offsets) - 1, source.shape[1]
    out = torch.empty(bags, width, device=source.device)
    block = tile(width)
    arrays = [x.contiguous() for x in (source, index, offsets, weights)]
    launch(_bag_sums, (bags, triton.cdiv(width, block)), out, *arrays, out, width, TILE=block, num_warps=2)
    return out


def token_sums(table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """As distlm.memory.lookup.token_sums: slots int32 [T, A], weights [T, A] → fp32 [T, d]."""
    tokens, reads = slots.shape
    # Not arange: without reads it has no step.
    offsets = torch.arange(tokens + 1, dtype=torch.int32, device=slots.device) * reads
    return bag_sums(table, slots.flatten(), offsets, weights.flatten())


def score_gradients(table: Tensor, slots: Tensor, gradient: Tensor) -> Tensor:
    """As distlm.memory.lookup.score_gradients, of a gradient [T, d] of any precision: fp32 [T, A]."""
    tokens, reads = slots.shape
    out = torch.empty(tokens, reads, device=table.device)
    grid = tokens, triton.cdiv(reads, _READS)
    block = min(_COLUMNS, power_of_two(table.shape[1]))
    arrays = table.contiguous(), slots.contiguous(), gradient.contiguous()
    launch(_score_gradients, grid, out, *arrays, out, reads, table.shape[1], READS=_READS, TILE=block, num_warps=4)
    return out
