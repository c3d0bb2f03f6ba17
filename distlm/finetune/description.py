"""What model.json records of a fine-tuned model."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from distlm.models.kind import Description
from distlm.models.plm.description import Backbone


@dataclass
class TaskModelConfig(Description):
    """What model.json records of a fine-tuned model."""

    KIND: ClassVar[str] = "plm_task"

    backbone: Backbone = field(default_factory=dict)
    """Hugging Face's configuration."""
    memory: dict[str, Any] = field(default_factory=dict)
    """MemoryConfig; empty: no memory."""
    seed: int = 1
    """Of the memory's values, keys and queries."""
    head: Literal["labels", "number", "span"] = "labels"
    """One of some labels, a number, or where an answer begins and ends."""
    labels: int = 2
    """Numbers that the head gives for a row, or (span) for a token."""
    task: str = ""
    """Name of the task."""
