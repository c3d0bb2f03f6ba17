"""What model.json records of a causal language model of Hugging Face."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from distlm.memory.placing import WithMemory
from distlm.models.kind import CausalDescription

OUTPUT, SIDES = "output", ("input", "output")


@dataclass
class HfModel(CausalDescription, WithMemory):
    """What model.json records of a model."""

    KIND: ClassVar[str] = "hf"

    backbone: dict[str, Any] = field(default_factory=dict)
    """Hugging Face's configuration."""
    width: int = 0
    """D of the hidden states."""
    max_positions: int = 0
    """Longest sequence, in tokens."""
    line_end: int = 0
    """Row of the embedding that </s> is."""
    begin: int = -1
    """Row of the beginning-of-text token in front of each block; −1: there is none."""

    memory: dict[str, Any] = field(default_factory=dict)
    """MemoryConfig, its positions named; empty: no memory."""
    seed: int = 1
    """Of the memory's values, keys and queries."""

    generation: dict[str, Any] = field(default_factory=dict)
    """Hugging Face's settings of `generate` (generation_config.json), where they say more than its configuration."""

    @property
    def begins(self) -> bool:
        return self.begin >= 0

    def recorded(self) -> dict[str, Any]:
        found = super().recorded()
        if not self.begins:
            # Models from before there was such a field keep their fingerprints.
            del found["begin"]
        if not self.generation:
            del found["generation"]
        return found

    @property
    def rows(self) -> int:
        """Rows of the embedding; a model may have more than its tokenizer has pieces."""
        text = self.backbone.get("text_config") or self.backbone
        return int(text["vocab_size"])
