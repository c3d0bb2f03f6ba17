"""All memories of one model: placed, made, saved and loaded together; values that layers share are there once."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from distlm.memory.config import MemoryConfig
from distlm.memory.layer import Dropout, ProductKeyMemory, memory_size
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.files import load_table, save_table
from distlm.memory.values.table import ValueTable

Memories = Mapping[int, ProductKeyMemory]
"""Layer, counted from 1 → its memory."""


def make_memories(
    config: MemoryConfig, width: int, seed: int, exchange: Exchange | None, dropout: Callable[[int], Dropout]
) -> dict[int, ProductKeyMemory]:
    """Fresh memories for the layers of config.positions, which are rising and the model's own.

    `exchange` joins the ranks that train them; None: this process has all of them. dropout(layer): see
    ProductKeyMemory. With config.shared all have the values of the first (Berges et al. 2024): keys, queries and gate
    stay each layer's own.
    """
    made: dict[int, ProductKeyMemory] = {}
    for layer in config.positions:
        # What is thrown away again is not drawn.
        own = replace(config, values="zero") if config.shared and made else config
        memory = ProductKeyMemory.of(own, width, layer, seed, exchange or Exchange.alone(), dropout(layer))
        if own is not config:
            memory.table = next(iter(made.values())).table
        made[layer] = memory
    return made


def tables_of(memories: Memories) -> dict[ValueTable, list[int]]:
    """Each table of values once → the layers that read it, rising."""
    found: dict[ValueTable, list[int]] = {}
    for layer, memory in memories.items():
        found.setdefault(memory.table, []).append(layer)
    return found


def save_memories(memories: Memories, folder: Path, extra: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Write this rank's files of all memories; `extra` of each layer is what its `extra_state_tensors` gives. Local.

    Those of further layers that share a table lie in its files as LAYER/NAME. Raises DistlmError as save_table.
    """
    for table, (first, *others) in tables_of(memories).items():
        shared = {f"{layer}/{name}": tensor for layer in others for name, tensor in extra[layer].items()}
        save_table(table, folder, first, {**extra[first], **shared})


def load_memories(
    memories: Memories, folder: Path, moments: bool = True, source: MemoryConfig | None = None
) -> dict[int, dict[str, Tensor]]:
    """Read the values that `save_memories` wrote on any number of ranks; the `extra` of each layer. Local.

    `moments`, `source`: see load_table. Raises DistlmError as load_table.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for table, layers in tables_of(memories).items():
        extra = load_table(table, folder, layers[0], moments, source)
        found |= {layer: extra_of(extra, layer, layers[0]) for layer in layers}
    return found


def extra_of(extra: Mapping[str, Tensor], layer: int, first: int) -> dict[str, Tensor]:
    """That of a layer, out of what `load_table` gives for the values of the layer `first`, which it reads."""
    start = "" if layer == first else f"{layer}/"
    names = {name: name.removeprefix(start) for name in extra if name.startswith(start)}
    return {own: extra[name] for name, own in names.items() if "/" not in own}


def restore_memories(memories: Memories, folder: Path, moments: bool = True) -> None:
    """The same, with running statistics and counters. Local. Raises DistlmError as load_table."""
    for layer, extra in load_memories(memories, folder, moments).items():
        memories[layer].load_extra(extra)


def layers_and_values(memory: Mapping[str, Any], width: int) -> tuple[int, int]:
    """Layers that have a memory, and numbers in all values together, of a description's `memory` (empty: none)."""
    if not memory:
        return 0, 0
    config = MemoryConfig(**memory)
    layers = len(config.positions)
    return layers, (1 if config.shared else layers) * memory_size(config, width).values
