"""The values of memories in a checkpoint folder: one safetensors file for each column range, read on any other cut.

memory-LL-FFFFF-EEEEE.safetensors   layer LL, columns FFFFF up to, not including, EEEEE; [K, columns]:
  values fp32, and from the first update on exp_avg, exp_avg_sq, fp32 or bf16 (memory.moments; read as either)
in the file of column 0 also
  last_step int32 [K], row_steps int32 [K] (memory.row_steps), extra.NAME (what else the caller has of the memory)
Metadata: layer, slots K, width D, updates. That files are whole and unchanged is for the checkpoint's marker to say
(distlm.training.checkpoint).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.memory.lookup import pieces
from distlm.memory.values.adam import Adam
from distlm.memory.values.exported import is_exported, load_exported
from distlm.memory.values.table import ValueTable
from distlm.runtime.files import order_metadata
from distlm.system_errors import AGAIN, reason, refuse

_NAME = re.compile(r"memory-(\d+)-(\d+)-(\d+)\.safetensors")
_PLANES = ("values", "exp_avg", "exp_avg_sq")
_COUNTERS = ("last_step", "row_steps")
_EXTRA = "extra."
_ROWS = 1 << 16


@dataclass(frozen=True)
class _Part:
    path: Path
    first: int
    last: int


def save_table(table: ValueTable, folder: Path, layer: int, extra: Mapping[str, Tensor] | None = None) -> None:
    """Write this rank's columns into `folder`: each rank of the first replica a file, the others none. Local.

    `extra` is written by the rank of column 0. Raises DistlmError when the file cannot be written.
    """
    if table.exchange.replica:
        return
    tensors = {name: getattr(table, name) for name in _PLANES}
    if table.first == 0:
        tensors |= {name: getattr(table, name) for name in _COUNTERS}
        tensors |= {_EXTRA + name: tensor for name, tensor in (extra or {}).items()}
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
    facts = {"layer": layer, "slots": table.slots, "width": table.width, "updates": table.updates}
    path = folder / f"memory-{layer:02d}-{table.first:05d}-{table.last:05d}.safetensors"
    try:
        save_file(held, path, {name: str(fact) for name, fact in facts.items()})
        order_metadata(path)
    except (OSError, SafetensorError) as error:
        what, mend = reason(error, path)
        raise DistlmError(f"{path}: the memory could not be written: {what}; {mend or AGAIN}") from error


@torch.no_grad()
def load_table(
    table: ValueTable, folder: Path, layer: int, moments: bool = True, source: MemoryConfig | None = None
) -> dict[str, Tensor]:
    """Read this rank's columns from the files that `save_table` wrote on any number of column ranks. Local.

    moments=False reads the values alone, for inference or another training that starts from them: moments and counters
    are those of a fresh table, and what memory.stale=catch_up still owed is made up for. `source` is then the
    configuration of the training that wrote the files, whose rule says what that is; None: the table's own. Returns
    `extra`. The folder may be one of `distlm export hf`, which has the values alone.
    Raises DistlmError when files are missing, cut, of two checkpoints or of another shape.
    """
    if is_exported(folder):
        return load_exported(table, folder, layer)
    parts = _find(table, folder, layer)
    if moments:
        return _read(table, parts, training=True)
    with _trained_as(table, source or table.config):
        extra = _read(table, parts, training=table.config.stale == "catch_up")
        table.settle()
    table.forget()
    return extra


@contextmanager
def _trained_as(table: ValueTable, config: MemoryConfig) -> Iterator[None]:
    """Within the block the table has the settings of another training, but counts no updates of single slots."""
    own = table.config, table.rule, table.row_steps
    table.config, table.rule, table.row_steps = config, Adam.of(config), None
    try:
        yield
    finally:
        table.config, table.rule, table.row_steps = own


def _read(table: ValueTable, parts: Sequence[_Part], training: bool) -> dict[str, Tensor]:
    """Values and, where `training`, moments and counters. Returns `extra`."""
    extra: dict[str, Tensor] = {}
    table.gradient.clear()
    table.exp_avg, table.exp_avg_sq = None, None
    for part in parts:
        with _opened(part.path) as file:
            names = set(file.keys())
            if part.first == 0:
                extra = {name.removeprefix(_EXTRA): file.get_tensor(name) for name in names if name.startswith(_EXTRA)}
                if training:
                    _read_counters(table, file, names, part.path)
            for name in _PLANES if training else ("values",):
                if name in names:
                    _read_columns(table, file, part, name)
    return extra


def _find(table: ValueTable, folder: Path, layer: int) -> list[_Part]:
    """The files of a layer in column order; they are of the table's shape and have each column once."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in sorted(folder.glob("memory-*.safetensors"))]
    parts = [_Part(path, int(m[2]), int(m[3])) for path, m in matches if m and int(m[1]) == layer]
    parts.sort(key=lambda part: part.first)
    if not parts:
        raise DistlmError(
            f"{folder}: no file memory-{layer:02d}-*.safetensors, so no memory of layer {layer}; copy the whole "
            "checkpoint folder, or set memory.positions to the layers that it has"
        )
    updates = set()
    for part in parts:
        with _opened(part.path) as file:
            facts, columns = file.metadata() or {}, file.get_slice("values").get_shape()[1]
        if (facts.get("slots"), facts.get("width")) != (str(table.slots), str(table.width)):
            raise DistlmError(
                f"{part.path}: holds {facts.get('slots')} slots of {facts.get('width')} values, the model has "
                f"{table.slots} of {table.width}; set memory.sub_keys and plm.width as there, or start anew with "
                "another run_dir="
            )
        if columns != part.last - part.first:
            raise DistlmError(f"{part.path}: holds {columns} columns; give the file back its first name")
        updates.add(facts.get("updates"))
    edges = [0, *(part.last for part in parts)], [*(part.first for part in parts), table.width]
    wrong = next((pair for pair in zip(*edges, strict=True) if pair[0] != pair[1]), None)
    if wrong or len(updates) > 1:
        fault = "the files are of different updates"
        if wrong:
            what = "missing" if wrong[0] < wrong[1] else "in two files"
            fault = f"columns {min(wrong)} to {max(wrong)} of {table.width} are {what}"
        raise DistlmError(
            f"{folder}: memory of layer {layer}: {fault} ({', '.join(part.path.name for part in parts)}); copy the "
            "whole checkpoint folder, or delete it to continue from the checkpoint before it"
        )
    return parts


def _read_counters(table: ValueTable, file: Any, names: set[str], path: Path) -> None:
    table.updates = int(file.metadata()["updates"])
    table.last_step.copy_(file.get_tensor("last_step"))
    if table.row_steps is None:
        return
    if "row_steps" in names:
        table.row_steps.copy_(file.get_tensor("row_steps"))
    elif table.updates:
        raise DistlmError(
            f"{path}: was trained with memory.row_steps=false and has no counts of each slot's updates; set it to "
            "false, or start anew with another run_dir="
        )


def _read_columns(table: ValueTable, file: Any, part: _Part, name: str) -> None:
    """Copy those of a file's columns that are this rank's."""
    first, last = max(part.first, table.first), min(part.last, table.last)
    if first >= last:
        return
    if name != "values":
        table.make_moments()
    stored, plane = file.get_slice(name), getattr(table, name)[:, first - table.first : last - table.first]
    for rows in pieces(table.slots, _ROWS):
        plane[rows] = stored[rows, first - part.first : last - part.first]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        refuse(error, path)
        raise DistlmError(
            f"{path}: cut or damaged ({error}); delete {path.parent} to continue from the checkpoint before it"
        ) from error
