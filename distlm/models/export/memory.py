"""Memories of a checkpoint as an exported model has them: MemoryReader's parameters, the values cut by columns."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from distlm.memory.config import MemoryConfig
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.exported import NAMES, STATISTICS, metadata_key
from distlm.memory.values.files import load_table
from distlm.memory.values.table import ValueTable
from distlm.models.export.weights import LIMIT, Pending

_SETTINGS = ("kind", "positions", "sub_keys", "heads", "k", "key_width", "query_norm", "alpha", "beta")
"""Settings of the section memory that decide what a memory computes."""


class StoredMemory(NamedTuple):
    """Values and query statistics of one memory, wherever they are."""

    columns: Callable[[int, int], Tensor]
    """(part, parts) → these columns of all values, fp32 [K, D / parts]."""
    statistics: Callable[[], Mapping[str, Tensor]]
    """`norm.running_mean` and `norm.running_var`, fp32 [H·key_width]; further entries do not count."""


def of_model(memory: ProductKeyMemory) -> StoredMemory:
    """Of a memory that has all columns of its values."""
    if memory.exchange.size > 1:
        raise ValueError("a memory that is shared with other ranks")

    def columns(part: int, parts: int) -> Tensor:
        # What slots that no update read have moved belongs to their values.
        memory.table.settle()
        width = memory.table.width // parts
        return memory.table.values[:, part * width : (part + 1) * width]

    return StoredMemory(columns, memory.extra_state_tensors)


def of_checkpoint(memory: ProductKeyMemory, folder: Path, layer: int) -> StoredMemory:
    """Of a checkpoint's files, read part by part: the model's own table is not used, and takes no memory if it is as it
    was made with memory.values=zero."""
    table = memory.table

    def read(part: int, parts: int) -> tuple[ValueTable, dict[str, Tensor]]:
        exchange = Exchange.alone()
        exchange.columns, exchange.column = parts, part
        config = MemoryConfig(**{**asdict(table.config), "values": "zero"})
        some = ValueTable(config, table.width, layer, 0, exchange)
        return some, load_table(some, folder, layer, moments=False)

    # The last column alone: it is the statistics that are asked for.
    return StoredMemory(lambda part, parts: read(part, parts)[0].values, lambda: read(table.width - 1, table.width)[1])


def value_parts(config: MemoryConfig, width: int, limit: int | None = None) -> int:
    """The fewest equal parts of the columns whose files keep to `limit` bytes (None: LIMIT)."""
    bytes_ = 4 * config.sub_keys**2 * width
    limit = LIMIT if limit is None else limit
    return next((parts for parts in range(1, width) if width % parts == 0 and bytes_ <= parts * limit), width)


def reader_settings(memory: Mapping[str, Any], width: int) -> dict[str, Any]:
    """config.json's "memory": what MemoryReader and the place of the memory take of MemoryConfig, and how the values
    are cut."""
    config = MemoryConfig(**memory)
    parts = value_parts(config, width)
    return {name: getattr(config, name) for name in _SETTINGS} | {"value_columns": [width // parts] * parts}


def memory_tensors(
    prefix: str, parameters: Mapping[str, Tensor], stored: StoredMemory, settings: Mapping[str, Any]
) -> Iterator[Pending]:
    """MemoryReader's tensors, named behind `prefix`. `parameters`: those of ProductKeyMemory by their names in it."""
    for name, tensor in parameters.items():
        yield Pending.of(f"{prefix}.{NAMES[name]}", tensor)
    if settings["query_norm"]:
        statistics = stored.statistics()
        for name, ours in STATISTICS.items():
            yield Pending.of(f"{prefix}.{ours}", statistics[name].float())
    columns = settings["value_columns"]
    for part, width in enumerate(columns):
        size = 4 * settings["sub_keys"] ** 2 * width
        yield Pending(f"{prefix}.values.{part}", size, lambda part=part: stored.columns(part, len(columns)))  # type: ignore[misc]


def memory_metadata(prefixes: Mapping[int, str]) -> dict[str, str]:
    """What each weights file says so that distlm finds the memories in it: layer → what their names begin with."""
    return {metadata_key(layer): prefix for layer, prefix in prefixes.items()}
