"""One update of one table: clipping, what stale slots have missed, Adam on the slots that were read."""

import torch
from torch import Tensor

from distlm.memory.lookup import add_column_squares_, rows_at_once
from distlm.memory.values.rows import update_rows
from distlm.memory.values.table import ValueTable


def update_table(table: ValueTable, scale: float, clip_norm: float, sweep: float) -> tuple[int, float]:
    """Apply `scale` times what the backwards have collected, and forget it. Collective.

    clip_norm: largest 2-norm (0: any); sweep: the share of slots read from which catch_up moves all of them. Returns
    how many slots were read, and the norm of their gradient before clipping. The gradient is summed for some hundred
    slots at a time and used at once; it never exists as a whole. With clip_norm it is summed twice, first for its norm:
    no more memory, and less time than storing it would take.
    """
    sums = table.gradient.take()
    squares: Tensor | None = None
    norm = 0.0
    sweeps = table.config.stale == "catch_up" and sums is not None and len(sums.rows) >= sweep * table.slots
    if sums is not None and clip_norm:
        squares = torch.zeros(table.values.shape[1], dtype=torch.float64, device=table.values.device)
        for _, gradient in sums.by_pieces(rows_at_once(table.values.shape[1], table.values.device, len(sums.rows))):
            add_column_squares_(squares, gradient)
        norm = abs(scale) * _root_over_columns(table, squares)
        scale *= min(1.0, clip_norm / (norm + 1e-6))
    if sums is not None:
        if table.has_stale:
            table.catch_up(table.all_rows() if sweeps else sums.rows)
        own = update_rows(table, sums.of_all(table.slots) if sweeps else sums, scale)
        if squares is None:
            norm = _root_over_columns(table, own)
        if sweeps:
            table.last_step.masked_fill_(table.last_step > 0, table.updates + 1)
        table.last_step[sums.rows] = table.updates + 1
    table.updates += 1
    table.settled = table.updates if sweeps else table.settled
    return 0 if sums is None else len(sums.rows), norm


def _root_over_columns(table: ValueTable, squares: Tensor) -> float:
    """Root of the sum of fp64 [n] over this rank's and all other columns; the same on all ranks. Collective."""
    return float(table.exchange.gather_tokens(squares, "norms").sum().sqrt())
