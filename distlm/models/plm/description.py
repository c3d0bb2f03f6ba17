"""What model.json records of a masked language model."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from distlm.models.kind import Description

Backbone = dict[str, Any]
"""Hugging Face's configuration of an encoder, all but the vocabulary's size; its fields are those of its library."""


@dataclass
class PlmModel(Description):
    """What model.json records of a masked language model."""

    KIND: ClassVar[str] = "plm"

    backbone: Backbone = field(default_factory=dict)
    """Hugging Face's configuration."""
    memory: dict[str, Any] = field(default_factory=dict)
    """MemoryConfig; empty: no memory."""
    seed: int = 1
    """Of the memory's values, keys and queries."""
