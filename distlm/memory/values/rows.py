"""One update of the rows of a table that were read."""

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from distlm.memory.lookup import rows_at_once, wide
from distlm.memory.values import kernels
from distlm.memory.values.gradient import SlotSums
from distlm.memory.values.random import rounding_keys, to_bf16
from distlm.memory.values.table import ValueTable


def update_rows(table: ValueTable, sums: SlotSums, scale: float) -> Tensor:
    """Adam with `scale` times the gradient `sums` on its slots, none of which is stale. Local.

    Returns Σ of the squares of the scaled gradient, fp64 [1]. The bits are those of any cut of the columns.
    """
    update = table.updates + 1
    if table.row_steps is not None:
        table.row_steps[sums.rows] += 1
    device = table.values.device
    loops = kernels.loops_of(device)
    if loops is None:
        return _Pieces(table, update, len(sums.rows)).run(sums, scale)
    updates = torch.tensor([update], device=device) if table.row_steps is None else table.row_steps[sums.rows]
    size, eps = table.rule.steps(updates)
    bags = sums.source, sums.index, sums.weights, sums.offsets
    planes = table.values, *table.make_moments()
    betas = table.rule.beta1, table.rule.beta2
    keys = rounding_keys(sums.rows, table.layer, update) if table.config.moments == "bf16" else sums.rows
    rounding = keys, table.first
    return loops.adam_rows(planes, sums.rows, bags, scale, betas, (size.float(), eps.float()), rounding)


class _Pieces:
    """With torch's operations: some hundred rows at a time are copied, updated by its fused Adam, and copied back."""

    def __init__(self, table: ValueTable, update: int, rows: int) -> None:
        self.table, self.rule, self.update = table, table.rule, update
        width, device = table.values.shape[1], table.values.device
        self.size = rows_at_once(width, device, rows)
        self.planes = table.values, *table.make_moments()
        self.rounded = table.config.moments == "bf16"
        self.wide_planes = [] if self.rounded else [wide(plane) for plane in self.planes]
        self.buffers = list(torch.zeros(3, self.size, width, device=device))
        self.wide_buffers = [wide(buffer) for buffer in self.buffers]
        self.steps = torch.tensor(0.0, device=device)

    def run(self, sums: SlotSums, scale: float) -> Tensor:
        squares = []
        for first, (rows, gradient) in zip(self._runs(sums.rows), sums.by_pieces(self.size), strict=True):
            if scale != 1:
                gradient.mul_(scale)
            squares.append(torch.dot(gradient.view(-1), gradient.view(-1)))
            if first is not None and not self.rounded:
                self._apply([plane[first : first + self.size] for plane in self.planes], gradient, rows)
            else:
                self._move(rows, gradient)
        return torch.stack(squares).double().sum().view(1)

    def _runs(self, rows: Tensor) -> list[int | None]:
        """For each piece of the slots its first one, if they are neighbours and need no copying; None if not."""
        firsts, lasts = rows[:: self.size].tolist(), rows[self.size - 1 :: self.size].tolist()
        return [
            first if last - first == self.size - 1 else None for first, last in zip_longest(firsts, lasts, fillvalue=-1)
        ]

    def _move(self, rows: Tensor, gradient: Tensor) -> None:
        """Slots int64 [c]; their gradient fp32 [size, d], size ≥ c."""
        for plane, buffer in zip(self.planes, self.buffers, strict=True):
            if plane.dtype == buffer.dtype:
                torch.index_select(plane, 0, rows, out=buffer[: len(rows)])
            else:
                buffer[: len(rows)] = plane[rows]
        # All of the buffers, a multiple of 16 numbers: what fills no vector register would be rounded otherwise.
        self._apply(self.buffers, gradient, rows)
        if self.rounded:
            values, m, v = (buffer[: len(rows)] for buffer in self.buffers)
            keys = rounding_keys(rows, self.table.layer, self.update)
            for plane, x in zip(self.planes, (values, *to_bf16(m, v, keys, self.table.first)), strict=True):
                plane[rows] = x
            return
        for plane, buffer in zip(self.wide_planes, self.wide_buffers, strict=True):
            plane.index_copy_(0, rows, buffer[: len(rows)])

    def _apply(self, planes: Sequence[Tensor], gradient: Tensor, rows: Tensor) -> None:
        values, m, v = planes
        if self.table.row_steps is None:
            self.rule.apply_(values, gradient, m, v, self.update, self.steps)
        else:
            self.rule.apply_by_row_(values, gradient, m, v, self.table.row_steps[rows])
