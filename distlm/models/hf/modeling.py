"""A causal model of Hugging Face that reads memories; `distlm export hf` copies this module, and what it uses."""

from typing import Any

from distlm.memory.inference import make_readers
from distlm.models.hf.memory import add_memory, layers_of


class ReadsMemory:
    """What goes in front of a model class of transformers: config.memory says which layers have a memory.

    It is what make_readers and add_memory take.
    """

    def __init__(self, config: Any, *given: Any, **named: Any) -> None:
        super().__init__(config, *given, **named)  # type: ignore[call-arg]
        _, name, layers = layers_of(self)
        for position, memory in make_readers(config.memory).items():
            add_memory(layers[position - 1], name, memory, config.memory, tuple)
