"""Reading exported masked language models, fine-tuned ones, too: folders of `distlm export hf` of this version, and
those of older ones.

In older folders a memory lies in files of its own: memory.json (MemoryExport), memory.safetensors (keys, query and norm
by their names in ProductKeyMemory), and memory-LL-00000-DDDDD.safetensors (distlm.memory.values.files).
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.memory.of_model import restore_memories
from distlm.memory.placing import values_to_come
from distlm.memory.values.exported import NAMES, STATISTICS
from distlm.models.complete import check_files, marked_hashes, memory_files
from distlm.models.export.folder import CONFIG, OURS, plain_config
from distlm.models.export.records import ExportManifest
from distlm.models.plm.description import PlmModel
from distlm.models.plm.model import Plm, transformers_library
from distlm.models.plm.records import MemoryExport
from distlm.models.tensor_file import open_tensors, read_tensors
from distlm.runtime.files import read_json
from distlm.system_errors import refuse

MEMORY = "memory.safetensors"
TASK_HEADS = ("ForSequenceClassification", "ForQuestionAnswering")
_OF_MEMORY = ".memory."
_MEND = "copy the whole folder, or export the checkpoint again"
_OWN_NAMES = {theirs: ours for ours, theirs in NAMES.items()}


class Folder(NamedTuple):
    """What is in an exported folder but for the memory's values and running statistics."""

    backbone: dict[str, Any]
    """Hugging Face's configuration."""
    weights: dict[str, Tensor]
    """By their names in the Hugging Face model; a memory's keys, query and norm, too."""
    memory: dict[str, Any]
    """MemoryConfig; empty: no memory."""


def has_memory(folder: Path | str) -> bool:
    """Whether an exported model with memory is there."""
    folder = Path(folder)
    if any((folder / name).exists() for name in (MemoryExport.NAME, MEMORY)):
        return True
    return (folder / CONFIG).is_file() and bool(_settings(folder).get("memory"))


def value_hashes(folder: Path) -> dict[str, str]:
    """Name → checksum of the files of a memory's values, as the folder records them."""
    if _is_old(folder):
        return memory_files(folder, MemoryExport)
    return marked_hashes(folder, "", ExportManifest)


def from_pretrained(folder: Path | str) -> Plm:
    """A masked language model with its memory, if it has one, in eval mode on the CPU.

    Raises DistlmError for missing, damaged or foreign files.
    """
    folder = Path(folder)
    model = without_values(folder)
    restore_memories(model.memories, folder, moments=False)
    return model.eval()


def without_values(folder: Path) -> Plm:
    """The model of the folder with all its weights; of its memory the values and running statistics are not taken.

    The memory's files, those of the values, too, are compared with their checksums.
    Raises DistlmError for missing, damaged or foreign files.
    """
    if head := task_head(folder):
        raise DistlmError(
            f"{folder}: a fine-tuned model (…{head}), which predicts no masked tokens; fine-tune it further "
            "(finetune.checkpoint), or read it with distlm.finetune.source.load_task_model"
        )
    backbone, weights, memory = read_folder(folder)
    vocabulary = backbone.pop("vocab_size")
    model = Plm(PlmModel(backbone, values_to_come(memory)), vocabulary)
    model.config.memory = memory
    own = _own_weights(model)
    if fault := _differences(model, own, weights):
        files = f"model.safetensors{f' and {MEMORY}' if memory and _is_old(folder) else ''}"
        described = f"{CONFIG}{f' and {MemoryExport.NAME}' if memory and _is_old(folder) else ''}"
        raise DistlmError(f"{folder}: {fault}; {files} and {described} do not belong together, copy the whole folder")
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    return model


def task_head(folder: Path) -> str:
    """How the name of the model's class at Hugging Face ends, where it has the head of a task; empty: it has none.

    Raises DistlmError when there is no config.json that can be read.
    """
    architecture = str(next(iter(_settings(folder).get("architectures") or ()), ""))
    return next((head for head in TASK_HEADS if architecture.endswith(head)), "")


def read_folder(folder: Path) -> Folder:
    """Read it. Of a model with memory all weights, those of the values, too, are compared with their checksums.

    Raises DistlmError for missing or damaged files.
    """
    library = transformers_library()
    settings = _settings(folder)
    ours = _is_ours(settings)
    memory = _memory_config(folder, settings if ours else {})
    if memory:
        check_files(folder, _MEND, marker=MemoryExport if _is_old(folder) else ExportManifest)
    try:
        plain = plain_config(folder)
        config = library.AutoConfig.for_model(**plain) if plain else library.AutoConfig.from_pretrained(str(folder))
        backbone = config.to_dict()
        weights = _read_weights(folder)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        refuse(error, folder)
        raise DistlmError(f"{folder}: not a Hugging Face model folder ({error})") from error
    if memory and _is_old(folder):
        weights |= read_tensors(folder / MEMORY)
    return Folder(backbone, weights, memory)


def tokenizer_options(place: str) -> dict[str, Any]:
    """What AutoTokenizer.from_pretrained needs so that it does not ask for the code of a folder's model."""
    if not (Path(place) / CONFIG).is_file() or not _is_ours(_settings(Path(place))):
        return {}
    return {"config": transformers_library().PreTrainedConfig()}


def _is_ours(settings: dict[str, Any]) -> bool:
    return str(settings.get("model_type", "")).startswith(OURS)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All but what load_table reads, a memory's by the names in ProductKeyMemory."""
    found = {}
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise OSError(f"no model.safetensors in {folder}")
    for path in paths:
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118  (a file is no dict)
                place, of_memory, theirs = name.partition(_OF_MEMORY)
                if of_memory and (theirs in STATISTICS.values() or theirs.startswith("values.")):
                    continue
                found[f"{place}{of_memory}{_OWN_NAMES.get(theirs, theirs)}" if of_memory else name] = file.get_tensor(
                    name
                )
    return found


def _own_weights(model: Plm) -> dict[str, Tensor]:
    """By their names in the Hugging Face model, tied ones under each; of a memory its parameters alone."""
    parameters = {name for name, _ in model.hf.named_parameters()}
    return {n: t for n, t in model.hf.state_dict().items() if _OF_MEMORY not in n or n in parameters}


def _differences(model: Plm, own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """The first weight that is missing, unknown or of another shape; empty: all fit."""
    # Tied weights are written once.
    tied = set(getattr(model.hf, "all_tied_weights_keys", {}) or {})
    for name in sorted({*own, *weights}):
        if name not in own:
            return f"unknown weight {name}"
        if name not in weights:
            if name not in tied:
                return f"no weight {name}"
        elif weights[name].shape != own[name].shape:
            return f"{name} is {list(weights[name].shape)}, {list(own[name].shape)} by its configuration"
    return ""


def _settings(folder: Path) -> dict[str, Any]:
    found = read_json(folder / CONFIG, "Hugging Face's configuration")
    return found if isinstance(found, dict) else {}


def _is_old(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MemoryExport.NAME, MEMORY))


def _memory_config(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """MemoryConfig; empty: no memory. `settings`: config.json, where model_type is ours."""
    path = folder / MemoryExport.NAME
    if path.exists():
        return dataclasses.asdict(MemoryExport.read(path).memory)
    if (folder / MEMORY).exists():
        raise DistlmError(f"{path}: missing beside {MEMORY}; copy the whole folder")
    if not settings.get("memory"):
        return {}
    if not (folder / ExportManifest.NAME).exists():
        raise DistlmError(f"{folder / ExportManifest.NAME}: missing beside {CONFIG}; {_MEND}")
    known = {field.name for field in dataclasses.fields(MemoryConfig)}
    return dataclasses.asdict(MemoryConfig(**{k: v for k, v in settings["memory"].items() if k in known}))
