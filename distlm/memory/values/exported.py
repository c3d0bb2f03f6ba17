"""The values of memories in a folder of `distlm export hf`: read for any cut of the columns.

There a memory has the names of distlm.memory.inference.MemoryReader, and values.i are neighbouring columns of all
slots. Each weights file's metadata say what the names of a layer's memory begin with.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distlm.errors import DistlmError
from distlm.memory.lookup import pieces
from distlm.memory.usage import Usage, UsageCounts
from distlm.memory.values.table import ValueTable
from distlm.system_errors import refuse

NAMES = {
    "retrieval.query.weight": "query.weight", "retrieval.query.bias": "query.bias", "retrieval.keys": "keys",
    "retrieval.norm.weight": "norm_weight", "retrieval.norm.bias": "norm_bias", "gate.gate.weight": "gate.gate.weight",
    "gate.out.weight": "gate.out.weight",
}  # fmt: skip
"""Parameter of ProductKeyMemory → its name in MemoryReader."""
STATISTICS = {"norm.running_mean": "norm_mean", "norm.running_var": "norm_variance"}
"""Likewise the query norm's statistics, as ProductKeyMemory.extra_state_tensors calls them."""
_ROWS = 1 << 16


def metadata_key(layer: int | str) -> str:
    """Entry of a weights file's metadata."""
    return f"memory.{layer}"


def is_exported(folder: Path) -> bool:
    """Whether a folder's memories, if any, are among its model's weights."""
    return (folder / "config.json").is_file() and not any(folder.glob("memory*.safetensors"))


@torch.no_grad()
def load_exported(table: ValueTable, folder: Path, layer: int) -> dict[str, Tensor]:
    """Read this rank's columns; moments and counters are those of a fresh table. Local.

    Returns what ProductKeyMemory.load_extra takes, with nothing read yet, and the same of all layers as LAYER/NAME.
    Raises DistlmError when the folder lacks the memory, or has it in another shape.
    """
    table.gradient.clear()
    table.forget()
    unread = Usage(table.slots).counts()
    extra: dict[str, Tensor] = {}
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        facts: dict[str, str] = {}
        for file, said in _opened(stack, folder):
            facts |= said
            tensors |= dict.fromkeys(file.keys(), file)
        prefix = facts.get(metadata_key(layer), "")
        values = [name for name in tensors if prefix and name.startswith(f"{prefix}.values.")]
        values.sort(key=lambda name: int(name.rpartition(".")[2]))
        shapes = [tensors[name].get_slice(name).get_shape() for name in values]
        if sum(shape[1] for shape in shapes) != table.width or any(shape[0] != table.slots for shape in shapes):
            found = f"values of {shapes}" if shapes else "no values"
            raise DistlmError(
                f"{folder}: {found} for the memory of layer {layer}, the model has {table.slots} slots of "
                f"{table.width} values; copy the whole folder"
            )
        first = 0
        for name, (_, columns) in zip(values, shapes, strict=True):
            _copy(table, tensors[name].get_slice(name), first, first + columns)
            first += columns
        for key, place in facts.items():
            if not key.startswith(metadata_key("")):
                continue
            number = key.removeprefix(metadata_key(""))
            start = "" if number == str(layer) else f"{number}/"
            extra |= {f"{start}usage.{field.name}": getattr(unread, field.name) for field in fields(UsageCounts)}
            for name, theirs in STATISTICS.items():
                if (there := f"{place}.{theirs}") in tensors:
                    extra[start + name] = tensors[there].get_tensor(there)
    return extra


def _copy(table: ValueTable, stored: Any, first: int, last: int) -> None:
    """Those of the columns [first, last) that are this rank's."""
    begin, end = max(first, table.first), min(last, table.last)
    if begin >= end:
        return
    plane = table.values[:, begin - table.first : end - table.first]
    for rows in pieces(table.slots, _ROWS):
        plane[rows] = stored[rows, begin - first : end - first]


def _opened(stack: ExitStack, folder: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            yield file, file.metadata() or {}
        except (OSError, SafetensorError) as error:
            refuse(error, path)
            raise DistlmError(f"{path}: cut or damaged ({error}); copy the whole folder") from error
