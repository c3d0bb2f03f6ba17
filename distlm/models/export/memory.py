"""Memories of a checkpoint as an exported model has them: MemoryReader's parameters, the values cut by columns."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from distlm.memory.config import MemoryConfig
from distlm.memory.of_model import Memories, extra_of, tables_of
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.exported import NAMES, STATISTICS, metadata_key
from distlm.memory.values.files import load_table
from distlm.memory.values.table import ValueTable
from distlm.models.buffers import kept_buffers
from distlm.models.export.weights import LIMIT, Pending, write_weights

_SETTINGS = (
    "kind", "positions", "shared", "gated", "sub_keys", "heads", "k", "key_width", "query_norm", "alpha", "beta",
)  # fmt: skip
"""Settings of the section memory that decide what a memory computes."""


class _Stored(NamedTuple):
    """Values and query statistics of one memory, wherever they are."""

    columns: Callable[[int, int], Tensor] | None
    """(part, parts) → these columns of all values, fp32 [K, D / parts]; None: another layer's values are read."""
    statistics: Callable[[], Mapping[str, Tensor]]
    """`norm.running_mean` and `norm.running_var`, fp32 [H·key_width]; further entries do not count."""


def reader_settings(memory: Mapping[str, Any], width: int) -> dict[str, Any]:
    """config.json's "memory": what make_readers and the place of the memory take of MemoryConfig, and how the values
    are cut."""
    config = MemoryConfig(**memory)
    parts = value_parts(config, width)
    return {name: getattr(config, name) for name in _SETTINGS} | {"value_columns": [width // parts] * parts}


def value_parts(config: MemoryConfig, width: int) -> int:
    """The fewest equal parts of the columns whose files keep to LIMIT bytes."""
    bytes_ = 4 * config.sub_keys**2 * width
    return next((parts for parts in range(1, width) if width % parts == 0 and bytes_ <= parts * LIMIT), width)


def memory_words(settings: Mapping[str, Any]) -> str:
    """reader_settings in words, to follow those of the model; empty without memory."""
    if not settings:
        return ""
    place = "in place of the feed-forward network" if settings["kind"] == "pkm" else "beside the feed-forward network"
    layers = ", ".join(map(str, settings["positions"]))
    more = [name for name in ("shared", "gated") if settings[name]]
    return (
        f", with {' and '.join([*more, ''])}product-key memory (Lample et al. 2019) of {settings['sub_keys'] ** 2:,} "
        f"slots {place} of layers {layers}, counted from 1"
    ).replace("and product", "product")


def write_model(
    folder: Path, model: nn.Module, memories: Memories, checkpoint: Path | None, settings: Mapping[str, Any],
    prefix: str = "",
) -> None:  # fmt: skip
    """The weights of a model and of its memories (maybe none), their names behind `prefix`.

    `checkpoint`: where the values and statistics of the memories are read from, a part at a time; None: the model has
    all their columns. `settings`: reader_settings of the memories.
    """
    dense = dict(model.named_parameters())
    places = {layer: _place(model, memory) for layer, memory in memories.items()}
    found: list[Pending] = []
    for layer, stored in _stored(memories, checkpoint).items():
        place = places[layer]
        own = {name: dense.pop(f"{place}.{name}").detach() for name, _ in memories[layer].named_parameters()}
        found += _tensors(f"{prefix}{place}", own, stored, settings)
    first = [Pending.of(f"{prefix}{name}", tensor) for name, tensor in {**dense, **kept_buffers(model)}.items()]
    write_weights([*first, *found], folder, {metadata_key(layer): f"{prefix}{p}" for layer, p in places.items()})


def _place(model: nn.Module, memory: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is memory)


def _stored(memories: Memories, checkpoint: Path | None) -> dict[int, _Stored]:
    if any(memory.exchange.size > 1 for memory in memories.values()):
        raise ValueError("memories that are shared with other ranks")
    found = {}
    for table, layers in tables_of(memories).items():
        first = layers[0]
        for layer in layers:
            if checkpoint is None:
                stored = _Stored(_of_table(table), memories[layer].extra_state_tensors)
            else:
                stored = _of_files(table, checkpoint, first, layer)
            found[layer] = stored if layer == first else stored._replace(columns=None)
    return found


def _of_table(table: ValueTable) -> Callable[[int, int], Tensor]:
    def columns(part: int, parts: int) -> Tensor:
        # What slots that no update read have moved belongs to their values.
        table.settle()
        width = table.width // parts
        return table.values[:, part * width : (part + 1) * width]

    return columns


def _of_files(table: ValueTable, folder: Path, first: int, layer: int) -> _Stored:
    """Of a checkpoint, read part by part: the model's own table is not used, and takes no memory if it is as it was
    made with memory.values=zero."""

    def read(part: int, parts: int) -> tuple[ValueTable, dict[str, Tensor]]:
        exchange = Exchange.alone()
        exchange.columns, exchange.column = parts, part
        config = MemoryConfig(**{**asdict(table.config), "values": "zero"})
        some = ValueTable(config, table.width, first, 0, exchange)
        return some, load_table(some, folder, first, moments=False)

    # The last column alone: it is the statistics that are asked for.
    return _Stored(
        lambda part, parts: read(part, parts)[0].values,
        lambda: extra_of(read(table.width - 1, table.width)[1], layer, first),
    )


def _tensors(
    place: str, parameters: Mapping[str, Tensor], stored: _Stored, settings: Mapping[str, Any]
) -> Iterator[Pending]:
    """MemoryReader's tensors. `parameters`: those of ProductKeyMemory by their names in it."""
    for name, tensor in parameters.items():
        yield Pending.of(f"{place}.{NAMES[name]}", tensor)
    if settings["query_norm"]:
        statistics = stored.statistics()
        for name, ours in STATISTICS.items():
            yield Pending.of(f"{place}.{ours}", statistics[name].float())
    if (read := stored.columns) is not None:
        columns = settings["value_columns"]
        for part, width in enumerate(columns):
            size = 4 * settings["sub_keys"] ** 2 * width
            yield Pending(f"{place}.values.{part}", size, lambda part=part: read(part, len(columns)))  # type: ignore[misc]
