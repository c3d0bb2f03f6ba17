"""Which layers of a model have a memory, and what its description records. Without torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from distlm.errors import UsageError
from distlm.memory.config import MemoryConfig


class WithMemory:
    """The description of a model that predicts the next word and may have a memory; its fields are these and others."""

    memory: dict[str, Any]
    """MemoryConfig, its positions named; empty: no memory."""
    seed: int
    """Of the memory's values, keys and queries."""


def placed(config: MemoryConfig, layers: int) -> dict[str, Any]:
    """What a model of so many layers records of the section `memory`: empty without one."""
    if config.kind == "none":
        return {}
    return dataclasses.asdict(dataclasses.replace(config, positions=positions_of(config, layers)))


def positions_of(config: MemoryConfig, layers: int) -> list[int]:
    """Layers, counted from 1, that have a memory: memory.positions, or the middle one of so many layers (of two the
    upper)."""
    return list(config.positions) or [layers // 2 + 1]


def require_layers(positions: list[int], layers: int) -> None:
    """Raises UsageError for a position that the model of so many layers does not have."""
    if any(not 1 <= position <= layers for position in positions):
        raise UsageError(f"memory.positions={positions}: the model has layers 1 to {layers}; choose among those")


def values_to_come(memory: Mapping[str, Any]) -> dict[str, Any]:
    """The memory's settings for a model whose values a file will give: none are drawn, none take memory until then."""
    return {**memory, "values": "zero"} if memory else {}
