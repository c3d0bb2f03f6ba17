"""Adam for the values of memories, on the slots that were read: gradient, moments and values in one pass over them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.memory.lookup import add_column_squares_, rows_at_once
from distlm.memory.values.rows import update_rows
from distlm.memory.values.table import ValueTable


@dataclass(frozen=True)
class ValueStep:
    """Outcome of one update of the values, one entry for each memory."""

    rows: list[int]
    """Slots that were read."""
    norms: list[float]
    """2-norm of the gradient, before clipping, over all columns."""
    bytes: int
    """Bytes that this rank sent in it."""


class SparseValueOptimizer:
    """SparseAdam, Adam or per-slot Adam (see MemoryConfig) on what the backwards of some tables have collected.

    Slots that no token read in the update stay as they are: lazy as torch's SparseAdam, or caught up with later. The
    gradient is summed for some hundred slots at a time and used at once; it never exists as a whole. With clip_norm it
    is summed twice, first for its norm: no more memory, and less time than storing it would take.
    """

    sweep = 1 / 16
    """catch_up: an update that reads this share of the slots moves all of them, so that none is stale afterwards. To go
    through a table in order takes less time than to find, and to add in every forward, what its slots have missed."""

    def __init__(self, config: MemoryConfig, tables: Sequence[ValueTable]) -> None:
        self.config, self.tables = config, list(tables)

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether what was collected is finite in all memories on all ranks; the same on every rank.

        For a loss scaler, before `step` or `drop`: one collective of one number per memory. Collective.
        """
        return not any(self._not_finite())

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> ValueStep:
        """Apply `scale` times the collected gradient, and forget it. Collective.

        scale undoes what the losses were multiplied with: 1 / (loss scale·ranks) where each rank's loss is the mean
        over its own tokens. All replicas make the same update, to the bit.
        Raises DistlmError on every rank, with the tables unchanged and the gradient forgotten, when it is not finite.
        """
        if self.config.frozen or not self.tables:
            return ValueStep([0] * len(self.tables), [0.0] * len(self.tables), 0)
        exchange = self.tables[0].exchange
        before = sum(exchange.bytes.values())
        wrong = [table for table, count in zip(self.tables, self._not_finite(), strict=True) if count]
        if wrong:
            self.drop()
            error = DistlmError(
                f"the gradient of the memory's values in layer {wrong[0].layer} is infinite or NaN at its update "
                f"{wrong[0].updates + 1}; lower memory.lr={self.config.lr} or train.lr, set memory.clip_norm, or train "
                "in fp32, and run the same command again"
            )
            error.shared = True
            raise error
        outcomes = [self._update(table, scale) for table in self.tables]
        rows, norms = [rows for rows, _ in outcomes], [norm for _, norm in outcomes]
        return ValueStep(rows, norms, sum(exchange.bytes.values()) - before)

    def drop(self) -> None:
        """Forget the collected gradient without an update (skipped for overflow). Local."""
        for table in self.tables:
            table.gradient.clear()

    def _not_finite(self) -> list[float]:
        if not self.tables:
            return []
        counts = torch.stack([table.gradient.not_finite().to(table.values.device) for table in self.tables])
        counts_of_all: list[float] = self.tables[0].exchange.sum(counts, "finite").tolist()
        return counts_of_all

    def _update(self, table: ValueTable, scale: float) -> tuple[int, float]:
        """One table's slots read and gradient norm."""
        sums = table.gradient.take()
        squares: Tensor | None = None
        norm = 0.0
        sweep = table.config.stale == "catch_up" and sums is not None and len(sums.rows) >= self.sweep * table.slots
        if sums is not None and self.config.clip_norm:
            squares = torch.zeros(table.values.shape[1], dtype=torch.float64, device=table.values.device)
            for _, gradient in sums.by_pieces(rows_at_once(table.values.shape[1], table.values.device, len(sums.rows))):
                add_column_squares_(squares, gradient)
            norm = abs(scale) * _root_over_columns(table, squares)
            scale *= min(1.0, self.config.clip_norm / (norm + 1e-6))
        if sums is not None:
            if table.has_stale:
                table.catch_up(table.all_rows() if sweep else sums.rows)
            own = update_rows(table, sums.of_all(table.slots) if sweep else sums, scale)
            if squares is None:
                norm = _root_over_columns(table, own)
            if sweep:
                table.last_step.masked_fill_(table.last_step > 0, table.updates + 1)
            table.last_step[sums.rows] = table.updates + 1
        table.updates += 1
        table.settled = table.updates if sweep else table.settled
        return 0 if sums is None else len(sums.rows), norm


def _root_over_columns(table: ValueTable, squares: Tensor) -> float:
    """Root of the sum of fp64 [n] over this rank's and all other columns; the same on all ranks. Collective."""
    return float(table.exchange.gather_tokens(squares, "norms").sum().sqrt())
