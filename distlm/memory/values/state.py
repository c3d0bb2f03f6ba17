"""What state dicts of modules and optimizers hold of a table: this rank's columns, and which those are.

  values       fp32 [K, d]: this rank's columns of all slots
  columns      int64 [3]: first column, one past the last, and the width D that they are columns of
and, of memory.stale=catch_up while moves are owed, without which the values alone are not what is read:
  exp_avg, exp_avg_sq    fp32 [K, d]; an optimizer's with memory.moments=bf16: bf16
  last_step              int32 [K]
  updates                int64 [2]: updates, settled (ValueTable)
  rule                   fp64 [5]: lr, β₁, β₂, ε of the owed moves; 1: ε is Adam's, 0: SparseAdam's
An optimizer's state dict has the latter of every table, columns beside them, and row_steps int32 [K] where they count.
All are the table's own tensors, no copies, as state dicts of torch are.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distlm.memory.config import MemoryConfig
from distlm.memory.values.adam import Adam

if TYPE_CHECKING:
    from distlm.memory.values.table import ValueTable

_OWED = ("exp_avg", "exp_avg_sq", "last_step", "updates", "rule")
OF_MODULE = ("values", "columns", *_OWED)


def of_module(table: "ValueTable") -> dict[str, Tensor]:
    """What the table's outputs depend on. Local."""
    found = {"values": table.values, "columns": _columns(table)}
    return found | _training(table) if table.has_stale and table.exp_avg is not None else found


def of_optimizer(table: "ValueTable") -> dict[str, Tensor]:
    """What further updates depend on beside the values; empty before the first one. Local."""
    if not table.updates:
        return {}
    found = _training(table) | {"columns": _columns(table)}
    return found if table.row_steps is None else found | {"row_steps": table.row_steps}


@torch.no_grad()
def load_module(table: "ValueTable", given: Mapping[str, Tensor]) -> None:
    """Take what `of_module` gave, on the same cut of the columns or, from a full table [K, D], on any.

    What the dict owes (catch_up) this table owes then, by the rule of the dict. Raises ValueError, with nothing
    changed, that names both shapes.
    """
    columns = given.get("columns")
    values = _cut(table, "values", given["values"], columns)
    owed = [name for name in _OWED if name in given]
    if owed and len(owed) < len(_OWED):
        missing = ", ".join(name for name in _OWED if name not in given)
        raise ValueError(f"{missing}: missing beside {', '.join(owed)}; give the whole state dict")
    planes = {name: _cut(table, name, given[name], columns) for name in owed if name.startswith("exp_avg")}
    if owed:
        _check_slots(table, "last_step", given["last_step"])
    table.gradient.clear()
    # A state dict that is only completed with the table's own values (export) moves no byte.
    if values.data_ptr() != table.values.data_ptr():
        table.values.copy_(values)
    if owed:
        _take(
            table, given, planes, dataclasses.replace(table.config, stale="catch_up", row_steps=False, moments="fp32")
        )
    else:
        table.owe_nothing()


@torch.no_grad()
def load_optimizer(table: "ValueTable", given: Mapping[str, Tensor], config: MemoryConfig) -> None:
    """Take what `of_optimizer` gave; `config` has what `rule` does not say. Raises ValueError as `load_module`."""
    if not given:
        table.forget()
        return
    planes = {n: _cut(table, n, given[n], given.get("columns")) for n in ("exp_avg", "exp_avg_sq") if n in given}
    counters = [name for name in ("last_step", "row_steps") if name in given]
    for name in counters:
        _check_slots(table, name, given[name])
    if config.row_steps != ("row_steps" in counters):
        raise ValueError(f"row_steps: {config.row_steps} in the groups and not in the state of a memory")
    table.gradient.clear()
    _take(table, given, planes, config)


def _training(table: "ValueTable") -> dict[str, Tensor]:
    config = table.config
    rule = [config.lr, *config.betas, config.eps, float(config.optimizer == "adam")]
    found = {
        "last_step": table.last_step,
        "updates": torch.tensor([table.updates, table.settled]),
        "rule": torch.tensor(rule, dtype=torch.float64),
    }
    if table.exp_avg is not None and table.exp_avg_sq is not None:
        found |= {"exp_avg": table.exp_avg, "exp_avg_sq": table.exp_avg_sq}
    return found


def _take(table: "ValueTable", given: Mapping[str, Tensor], planes: Mapping[str, Tensor], config: MemoryConfig) -> None:
    lr, beta1, beta2, eps, adam = given["rule"].tolist()
    form: Any = "adam" if adam else "sparse_adam"
    table.config = dataclasses.replace(config, lr=lr, betas=[beta1, beta2], eps=eps, optimizer=form)
    table.rule = Adam.of(table.config)
    table.exp_avg, table.exp_avg_sq = None, None
    if planes:
        for name, plane in zip(("exp_avg", "exp_avg_sq"), table.make_moments(), strict=True):
            plane.copy_(planes[name])
    table.last_step.copy_(given["last_step"])
    table.row_steps = torch.zeros_like(table.last_step).copy_(given["row_steps"]) if config.row_steps else None
    table.updates, table.settled = given["updates"].tolist()


def _columns(table: "ValueTable") -> Tensor:
    return torch.tensor([table.first, table.last, table.width])


def _check_slots(table: "ValueTable", name: str, given: Tensor) -> None:
    if given.shape != (table.slots,):
        raise ValueError(f"{name} is {list(given.shape)}, this memory's {[table.slots]} (sub_keys² slots)")


def _cut(table: "ValueTable", name: str, given: Tensor, columns: Tensor | None) -> Tensor:
    """This rank's columns [K, d] of a plane."""
    own = [table.first, table.last, table.width]
    here = f"this rank has columns {table.first} to {table.last} of {table.width}, {[table.slots, own[1] - own[0]]}"
    shape, place = list(given.shape), None if columns is None else columns.tolist()
    there = f"{name} is {shape}" + (f", columns {place[0]} to {place[1]} of {place[2]}" if place else "")
    if len(shape) != 2 or shape[0] != table.slots or (place or own)[2] != table.width:
        raise ValueError(
            f"{there}; {here}: another number of slots or another width; build the memory with the width and sub_keys "
            "of the one that was saved"
        )
    if shape[1] == table.width:
        return given[:, table.first : table.last]
    if place is None:
        raise ValueError(f"{there}, and no `columns` says which of {table.width} columns they are; {here}")
    if place != own or shape[1] != own[1] - own[0]:
        raise ValueError(
            f"{there}; {here}. Load each rank's own file on as many ranks, or a full table: ValueTable.whole() before "
            "saving, or torch.cat of all ranks' values along dimension 1"
        )
    return given
