"""Starting a model with memory from a dense one: Init of Kim & Jung (2020, section 3.3) for any kind of model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.models.buffers import stored_tensors
from distlm.models.records import ModelCard
from distlm.training.start.init_from import require_dictionary


def take_dense(
    model: Any, config: MemoryConfig, weights: Mapping[str, Tensor], card: ModelCard, dictionary: str, source: str
) -> None:
    """Copy the weights of a model without memory into a fresh `model` with memories, which stay fresh. Local.

    The feed-forward networks of the memories' layers are left out where the model has none there (memory.kind=pkm),
    and stay fresh with memory.fresh_ffn. `model` has `memories` and `ffn_names`. `dictionary`, `source`: see
    take_weights. Raises DistlmError for another dictionary, and for names or shapes that are not the model's.
    """
    require_dictionary(card, dictionary, source)
    ffn = tuple(start for layer in model.memories for start in model.ffn_names[layer])
    of_memory = _memory_starts(model)
    own = {
        name: tensor
        for name, tensor in stored_tensors(model).items()
        if not name.startswith(of_memory) and not (config.fresh_ffn and name.startswith(ffn))
    }
    missing = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    unused = [name for name in weights if name not in own and not name.startswith(ffn)]
    if missing or unused:
        name = (missing or unused)[0]
        there = list(weights[name].shape) if name in weights else "missing"
        here = list(own[name].shape) if name in own else "missing"
        raise DistlmError(
            f"{source}: {name} is {there} there, {here} here: another model; give the settings of the model as they "
            "are there"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def _memory_starts(model: Any) -> tuple[str, ...]:
    """How the names of the memories' own parameters begin."""
    memories = {id(memory) for memory in model.memories.values()}
    return tuple(f"{name}." for name, module in model.named_modules() if id(module) in memories)
