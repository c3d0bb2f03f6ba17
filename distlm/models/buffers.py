"""Persistent buffers: numbers that a model computes with and no gradient trains, which its files hold all the same.

Models of Hugging Face have them (the scale of a layer of Gemma 4, the bias of DeepSeek-V3's router). The other kinds
have none: their positions are computed, and values and query statistics of a memory lie in files of its own.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from distlm.memory.layer import ProductKeyMemory


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name → buffer of those that belong to the model's file: the persistent ones, any dtype, shared ones once,
    without those of memories."""
    memories = (part for part in model.modules() if isinstance(part, ProductKeyMemory))
    seen = {id(buffer) for memory in memories for buffer in memory.buffers()}
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            # torch has no public word for it.
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                found[f"{path}.{name}" if path else name] = buffer
    return found


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a model folder holds of a model: its parameters under the names of named_parameters(), and kept_buffers."""
    return {**dict(model.named_parameters()), **kept_buffers(model)}


def set_buffers(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace each of kept_buffers by the tensor of its name, in all modules that share it. KeyError for a missing
    one; further names do not count."""
    new = {id(buffer): tensors[name] for name, buffer in kept_buffers(model).items()}
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if id(buffer) in new:
                setattr(module, name, new[id(buffer)])
