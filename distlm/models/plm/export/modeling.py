"""An encoder of Hugging Face that reads memories; `distlm export hf` copies this module's definitions, and those they
use, and makes a class for each architecture from them."""

from typing import Any

from distlm.memory.inference import MemoryReader
from distlm.models.plm.with_memory import add_memory, layers_of


class ReadsMemory:
    """What goes in front of a model class of transformers: config.memory says which layers have a memory.

    Its "positions" are layers, counted from 1; the rest is what MemoryReader and add_memory take. With "shared" all
    layers read the values of the first.
    """

    def __init__(self, config: Any, *given: Any, **named: Any) -> None:
        super().__init__(config, *given, **named)  # type: ignore[call-arg]
        layers, values = layers_of(self), None
        for position in config.memory["positions"]:
            memory = MemoryReader(config.memory, config.hidden_size, values)
            values = memory.values if config.memory.get("shared") and values is None else values
            add_memory(layers[position - 1], memory, config.memory, tuple)
