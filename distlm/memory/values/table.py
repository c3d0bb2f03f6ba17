"""The values of one product-key memory: this rank's columns of all slots, with their moments and counters."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distlm.errors import UsageError
from distlm.memory.config import MemoryConfig
from distlm.memory.lookup import pieces, rows_at_once, score_gradients, token_sums
from distlm.memory.values import state
from distlm.memory.values.adam import Adam
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.gradient import ValueGradient
from distlm.memory.values.random import normal_

_LINE = 64
"""Bytes of a cache line."""
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""memory.moments → dtype of the planes."""


class ValueTable(nn.Module):
    """K = n² slots of D values, this rank's columns of them: y[t] = Σ over the reads of weight·value[slot].

    The values are neither parameters nor buffers: what shards, averages, casts or broadcasts those does not see them
    (DistributedDataParallel gives every rank the buffers of rank 0, where each rank has columns of its own). They stay
    fp32 when the module is cast, follow it to another device, and are in its state dict (distlm.memory.values.state).
    SparseValueOptimizer updates them, distlm.memory.values.files has them in checkpoints.

    First values: N(0, 1/D), a function of (seed, layer, slot, column) alone (or zero, by config.values).

    N ranks compute what one rank computes, to the bit, for any number of column ranks and replicas: outputs, values,
    moments and counters. The gradient of the weights is the one exception: it is a sum over columns, whose order is
    that of the cut (fp32 rounding). The tokens of a micro-batch lie on the ranks in contiguous pieces in rank order,
    equally many on each.

    With config.stale = catch_up a slot that no update reads is moved as Adam with zero gradients would move it. The
    move is made up for when an update reads the slot again; until then every forward adds it to what it reads, in
    training and evaluation. So the memory computes what dense Adam's would, while the table changes in updates only.
    """

    TENSORS = ("values", "exp_avg", "exp_avg_sq", "last_step", "row_steps")

    values: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    last_step: Tensor
    row_steps: Tensor | None

    def __init__(self, config: MemoryConfig, width: int, layer: int, seed: int, exchange: Exchange) -> None:
        """width: D. Raises DistlmError when the column ranks do not divide D, or a setting cannot work."""
        super().__init__()
        if width % exchange.columns:
            raise UsageError(
                f"memory.columns={exchange.columns} does not divide the model's width, {width}; set it to a divisor of "
                "both the width and the number of ranks"
            )
        self.config, self.width, self.layer, self.exchange = config, width, layer, exchange
        self.rule = Adam.of(config)
        self.slots = config.sub_keys**2
        """K."""
        columns = width // exchange.columns
        self.first = exchange.column * columns
        """First column of this rank."""
        self.last = self.first + columns
        """One past its last column."""
        self.updates = 0
        """Updates applied so far."""
        self.settled = 0
        """catch_up: the update after which no slot was stale; equal to `updates`: none is now."""
        values = zeros(self.slots, columns, torch.device("cpu"))
        if config.values == "normal":
            normal_(values, width**-0.5, seed, layer, self.first)
        steps = torch.zeros(self.slots, dtype=torch.int32)
        self.values = values  # fp32 [K, d]
        self.exp_avg = None  # fp32 or bf16 [K, d], from the first update
        self.exp_avg_sq = None
        self.last_step = steps  # int32 [K]: the update that last read (or swept) the slot, from 1; 0: none read it yet
        self.row_steps = steps.clone() if config.row_steps else None  # int32 [K]: updates that read the slot
        self.gradient = ValueGradient(self.slots, columns, exchange)
        """What the next update consists of."""

    def forward(self, slots: Tensor, weights: Tensor, out_dtype: torch.dtype) -> Tensor:
        """slots int32 [T, A], weights fp32 [T, A] → out_dtype [T, D]. Collective over the column group.

        Summed in fp32, whatever out_dtype. Differentiable in the weights. In training, unless the values are frozen,
        the backward keeps what the values' gradient is made of (ValueGradient). There is no gradient tensor of K slots
        then, and no tensor of one row for every read.
        """
        learning = self.training and not self.config.frozen and torch.is_grad_enabled()
        # Requires a gradient itself, so that the backward comes to pass when nothing upstream is trained.
        trigger = torch.empty(0, requires_grad=learning)
        return _Lookup.apply(weights, trigger, self, slots, out_dtype)

    def configure(self, config: MemoryConfig) -> None:
        """Train by other settings from the next update on; what is owed by the present ones is made up for. Local.

        Raises UsageError naming the setting that cannot work.
        """
        if config == self.config:
            return
        rule = Adam.of(config)
        if config.row_steps and self.row_steps is None and self.updates:
            raise UsageError(
                f"memory.row_steps=true: layer {self.layer} has been trained for {self.updates} updates without counts "
                "of each slot's own; set it to false"
            )
        changed = rule != self.rule or config.stale != self.config.stale
        if changed:
            self.settle()
        if config.row_steps != (self.row_steps is not None):
            self.row_steps = torch.zeros_like(self.last_step) if config.row_steps else None
        self.config, self.rule = config, rule
        if self.exp_avg is not None and self.exp_avg_sq is not None and self.exp_avg.dtype != MOMENTS[config.moments]:
            given = self.exp_avg, self.exp_avg_sq
            self.exp_avg = self.exp_avg_sq = None
            for plane, old in zip(self.make_moments(), given, strict=True):
                plane.copy_(old)
        if changed:
            self.owe_nothing()

    def owe_nothing(self) -> None:
        """catch_up: the values are what dense Adam's would be now, whatever was missed. Local."""
        if self.config.stale == "catch_up" and self.settled < self.updates:
            self.last_step.masked_fill_(self.last_step > 0, self.updates)
            self.settled = self.updates

    def make_moments(self) -> tuple[Tensor, Tensor]:
        """exp_avg and exp_avg_sq, made as zeros when there are none."""
        if self.exp_avg is None or self.exp_avg_sq is None:
            columns, device = self.values.shape[1], self.values.device
            self.exp_avg, self.exp_avg_sq = (
                zeros(self.slots, columns, device, MOMENTS[self.config.moments]) for _ in range(2)
            )
            self.settled = 0
        return self.exp_avg, self.exp_avg_sq

    def planes(self) -> list[Tensor]:
        """Values and, where there are any, moments: [K, d] each."""
        return [x for x in (self.values, self.exp_avg, self.exp_avg_sq) if x is not None]

    @property
    def has_stale(self) -> bool:
        """catch_up, and some slot may have missed an update."""
        return self.config.stale == "catch_up" and self.settled < self.updates

    def missed(self, rows: Tensor) -> Tensor:
        """Updates since the last one that read these slots (int64 [n]): int32 [n], 0 where none ever did."""
        last = self.last_step[rows]
        return torch.where(last > 0, self.updates - last, 0)

    def read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """This rank's columns of the weighted sums: slots int32 [T, A], weights fp32 [T, A] → fp32 [T, d]. Local."""
        out = token_sums(self.values, slots, weights)
        for tokens, moves, places, stale in self._drifts(slots):
            out[tokens] += token_sums(moves, places, weights[tokens] * stale)
        return out

    def score_gradients(self, slots: Tensor, gradient: Tensor) -> Tensor:
        """⟨gradient, value⟩ over this rank's columns: int32 [T, A], fp32 [T, d] → fp32 [T, A]. Local."""
        out = score_gradients(self.values, slots, gradient)
        for tokens, moves, places, stale in self._drifts(slots):
            out[tokens] += score_gradients(moves, places, gradient[tokens]) * stale
        return out

    def forget(self) -> None:
        """No moments and no updates, as a fresh table; the values stay. Local."""
        self.exp_avg, self.exp_avg_sq, self.updates = None, None, 0
        self.gradient.clear()
        for counter in (self.last_step, self.row_steps):
            if counter is not None:
                counter.zero_()

    @torch.no_grad()
    def settle(self) -> None:
        """catch_up: make up for all missed updates in the table itself, as before its values are used elsewhere. Local.

        Training may go on from there, with other rounding than without.
        """
        if self.has_stale:
            self.catch_up(self.all_rows())
            self.settled = self.updates

    def extra_repr(self) -> str:
        return f"{self.slots} slots of {self.width} values" + (
            f", columns {self.first} to {self.last}" if self.exchange.columns > 1 else ""
        )

    @torch.no_grad()
    def whole(self) -> Tensor:
        """All columns of all slots, fp32 [K, D], on every rank, for one file that any number of ranks can load; what
        was owed is made up for first. Alone it is the table itself, no copy. Collective."""
        self.settle()
        if self.exchange.columns == 1:
            return self.values
        parts = torch.empty(self.slots, self.exchange.columns, self.values.shape[1], device=self.values.device)
        for rows in pieces(self.slots, 1 << 16):
            gathered = self.exchange.gather_tokens(self.values[rows], "values")
            parts[rows] = gathered.view(self.exchange.columns, -1, self.values.shape[1]).transpose(0, 1)
        return parts.flatten(1)

    def all_rows(self) -> Tensor:
        """int64 [K] on the table's device."""
        return torch.arange(self.slots, device=self.values.device)

    def catch_up(self, rows: Tensor) -> None:
        """Make up for the updates that these slots, int64 [n], have missed. Local."""
        if self.exp_avg is None or self.exp_avg_sq is None:
            return
        for part in rows.split(rows_at_once(self.values.shape[1], self.values.device)):
            missed, order = self.missed(part).sort(descending=True, stable=True)
            missed = missed[: int((missed > 0).sum())]
            stale = part[order[: len(missed)]]
            m, v = self.exp_avg[stale], self.exp_avg_sq[stale]
            self.values[stale] += self.rule.drift(m, v, self.last_step[stale], missed)
            decay1, decay2 = self.rule.decays(missed)
            self.exp_avg[stale] = m.mul_(decay1)
            self.exp_avg_sq[stale] = v.mul_(decay2)
            self.last_step[stale] = self.updates

    def _drifts(self, slots: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """What stale slots have moved since they were last updated, for some tokens at a time.

        slots int32 [T, A] → (tokens, moves fp32 [n, d], int32 [tokens, A]: the place of each read's slot in them, bool
        [tokens, A]: whether it has one).
        """
        if not self.has_stale or self.exp_avg is None or self.exp_avg_sq is None:
            return
        at_once = max(1, 16 * rows_at_once(self.values.shape[1], slots.device) // slots.shape[1])
        for tokens in pieces(len(slots), at_once):
            rows, places = slots[tokens].unique(return_inverse=True)
            missed, order = self.missed(rows.long()).sort(descending=True, stable=True)
            count = int((missed > 0).sum())
            if count == 0:
                continue
            stale = rows[order[:count]].long()
            moves = self.rule.drift(self.exp_avg[stale], self.exp_avg_sq[stale], self.last_step[stale], missed[:count])
            at = torch.full_like(order, -1)
            at[order[:count]] = torch.arange(count, device=order.device)
            places = at[places]
            yield tokens, moves, places.clamp(min=0).int(), places >= 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ValueTable":
        device = fn(self.values.new_empty(0)).device
        for name in self.TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))
        self.gradient.to(device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: tensor for name, tensor in state.of_module(self).items()})

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        given = {name.removeprefix(prefix): state_dict[name] for name in state_dict if name.startswith(prefix)}
        if "values" not in given:
            missing_keys.append(prefix + "values")
            return
        if strict:
            unexpected_keys += [prefix + name for name in given if name not in state.OF_MODULE]
        try:
            state.load_module(self, given)
        except ValueError as error:
            error_msgs.append(f"{prefix}{error}")


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, trigger: Tensor, table: ValueTable, slots: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        exchange = table.exchange
        slots = exchange.gather_tokens(slots.detach(), "slots")
        weights = exchange.gather_tokens(weights.detach(), "weights")
        ctx.table, ctx.learning = table, trigger.requires_grad
        ctx.save_for_backward(slots, weights)
        return exchange.to_tokens(table.read(slots, weights).to(out_dtype), "outputs")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        table, (slots, weights) = ctx.table, ctx.saved_tensors
        gradient = table.exchange.to_columns(upstream[0].contiguous(), "output gradients")
        of_weights = None
        if ctx.needs_input_grad[0]:
            parts = table.score_gradients(slots, gradient.float())
            of_weights = table.exchange.sum_columns(parts, "weight gradients")
        if ctx.learning:
            table.gradient.add(slots, weights, gradient)
        return of_weights, None, None, None, None


def zeros(rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros; on a processor memory that is taken page by page when it is written, in huge pages where there are.

    numpy asks for both, torch for neither; rows at random places are read a fifth faster from huge pages. The first row
    begins where a cache line does.
    """
    if device.type != "cpu":
        return torch.zeros(rows, columns, device=device, dtype=dtype)
    size = rows * columns * dtype.itemsize
    taken = np.zeros(size + _LINE, np.uint8)
    first = -taken.ctypes.data % _LINE
    return torch.from_numpy(taken[first : first + size]).view(dtype).view(rows, columns)
