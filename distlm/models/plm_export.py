"""Masked language models as Hugging Face folders, with a memory in files of its own beside the others.

FOLDER/
  config.json, model.safetensors   as Hugging Face's save_pretrained writes them; without memory any program reads them
  memory.json                      MemoryConfig and format; not there without memory
  memory.safetensors               LAYER.NAME: keys, query and norm (weights and running statistics), values [K, D]
  vocab.txt, tokenizer.json ...    the tokenizer, where one is given
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from distlm.config.plm import MemoryConfig
from distlm.errors import DistlmError
from distlm.models.plm import Plm, PlmModel, transformers_library, values_to_come
from distlm.runtime.files import atomic_path, read_json, sync_file, write_json

CONFIG, MEMORY = "memory.json", "memory.safetensors"
_FORMAT = 1
_OF_MEMORY = ".memory."


def save_pretrained(model: Plm, folder: Path, tokenizer: Path | None = None) -> None:
    """Write the folder from a model that has all columns of its values. `tokenizer`: a folder to take files from.

    Raises DistlmError when the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DistlmError(f"{folder}: not empty; give another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    transformers_library().utils.logging.disable_progress_bar()
    dense = {name: tensor for name, tensor in model.hf.state_dict().items() if _OF_MEMORY not in name}
    model.hf.save_pretrained(folder, state_dict=dense)
    sync_file(folder / "model.safetensors")
    if tokenizer is not None:
        for path in tokenizer.iterdir():
            shutil.copy(path, folder / path.name)
    if not model.memories:
        return
    tensors: dict[str, Tensor] = {}
    for layer, memory in model.memories.items():
        if memory.table.exchange.columns > 1:
            raise ValueError("save_pretrained of a model that has some columns only")
        # What slots that no update read have moved belongs to their values.
        memory.table.settle()
        tensors |= {f"{layer}.{name}": tensor for name, tensor in _of_memory(memory).items()}
    with atomic_path(folder / MEMORY) as temporary:
        safetensors.torch.save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    write_json(folder / CONFIG, {"format": _FORMAT, "memory": dict(model.config.memory)})


def from_pretrained(folder: Path | str) -> Plm:
    """A masked language model with its memory, if it has one, in eval mode on the CPU.

    Raises DistlmError for missing, damaged or foreign files.
    """
    folder = Path(folder)
    library = transformers_library()
    try:
        backbone: dict[str, Any] = library.AutoConfig.from_pretrained(str(folder)).to_dict()
        weights = safetensors.torch.load_file(folder / "model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise DistlmError(f"{folder}: not a Hugging Face model folder ({error})") from error
    memory = _memory_config(folder)
    vocabulary = backbone.pop("vocab_size")
    model = Plm(PlmModel(backbone, values_to_come(memory)), vocabulary)
    model.config.memory = memory
    missing, unknown = model.hf.load_state_dict(weights, strict=False)
    # Tied weights are written once.
    tied = set(getattr(model.hf, "all_tied_weights_keys", {}) or {})
    lost = [name for name in missing if _OF_MEMORY not in name and name not in tied]
    if lost or unknown:
        raise DistlmError(
            f"{folder}: model.safetensors {'has no ' + lost[0] if lost else 'has the unknown ' + unknown[0]}; "
            f"it and config.json{' and memory.json' if memory else ''} do not belong together"
        )
    if memory:
        _load_memories(model, folder)
    return model.eval()


def _memory_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        if (folder / MEMORY).exists():
            raise DistlmError(f"{folder / CONFIG}: missing beside {MEMORY}; copy the whole folder")
        return {}
    card = read_json(folder / CONFIG, "description of a memory")
    known = {field.name for field in dataclasses.fields(MemoryConfig)}
    if card.get("format") != _FORMAT or not set(card.get("memory", {"": 0})) <= known:
        raise DistlmError(f"{folder / CONFIG}: not a memory of format {_FORMAT}; written by another version of distlm")
    found: dict[str, Any] = card["memory"]
    return found


def _load_memories(model: Plm, folder: Path) -> None:
    path = folder / MEMORY
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DistlmError(f"{path}: missing, cut or damaged ({error}); copy the whole folder") from error
    with torch.no_grad():
        for layer, memory in model.memories.items():
            for name, tensor in _of_memory(memory).items():
                found = tensors.get(f"{layer}.{name}")
                if found is None or found.shape != tensor.shape:
                    shape = "missing" if found is None else list(found.shape)
                    raise DistlmError(f"{path}: {layer}.{name} is {shape}, {list(tensor.shape)} in {CONFIG}")
                tensor.copy_(found)


def _of_memory(memory: Any) -> dict[str, Tensor]:
    """Name → tensor of what a memory computes with: parameters, running statistics and values."""
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in memory.named_parameters()}
    if memory.retrieval.norm is not None:
        norm = memory.retrieval.norm
        tensors |= {"retrieval.norm.running_mean": norm.running_mean, "retrieval.norm.running_var": norm.running_var}
    return tensors | {"values": memory.table.values}
