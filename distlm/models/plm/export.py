"""Masked language models, fine-tuned ones, too, as Hugging Face folders, with a memory in files of its own beside the
others.

FOLDER/
  config.json, model.safetensors   as Hugging Face's save_pretrained writes them; without memory any program reads them
  vocab.txt, tokenizer.json ...    the tokenizer, where one is given
and with memory
  memory.json                      MemoryConfig, format, and bytes and checksum of the files below
  memory.safetensors               keys, query and norm, by the names that they have in the Hugging Face model
  memory-LL-00000-DDDDD.safetensors   layer LL's values [K, D] and running statistics (distlm.memory.values.files)

It is written under another name, flushed to the disk and renamed, so FOLDER is whole or not there.
"""

import argparse
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors
import safetensors.torch
from torch import Tensor

from distlm.data.shards.files import TOKENIZER_FOLDER
from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.of_model import restore_memories, save_memories
from distlm.memory.placing import values_to_come
from distlm.models.complete import check_files, listing, marked_hashes
from distlm.models.plm.config import PlmRun
from distlm.models.plm.description import PlmModel
from distlm.models.plm.io import load_plm
from distlm.models.plm.model import Plm, transformers_library
from distlm.models.plm.records import MemoryExport
from distlm.runtime.files import read_json, sync_file, sync_folder
from distlm.runtime.rundir import RunDir

MEMORY = "memory.safetensors"
TASK_HEADS = ("ForSequenceClassification", "ForQuestionAnswering")
_OF_MEMORY = ".memory."


class Exportable(Protocol):
    """A model of Hugging Face with memories, maybe none."""

    @property
    def hf(self) -> Any:
        """The model of Hugging Face."""

    @property
    def memories(self) -> Mapping[int, ProductKeyMemory]:
        """Layer → its memory."""

    @property
    def config(self) -> Any:
        """Its description; has the section memory."""


class Folder(NamedTuple):
    """What is in an exported folder but for the memory's values and running statistics."""

    backbone: dict[str, Any]
    """Hugging Face's configuration."""
    weights: dict[str, Tensor]
    """By their names in the Hugging Face model; a memory's keys, query and norm, too."""
    memory: dict[str, Any]
    """MemoryConfig; empty: no memory."""


def export_run(config: PlmRun, options: argparse.Namespace) -> dict[str, object]:
    """`distlm export hf --out FOLDER`: the newest checkpoint of a run, with its tokenizer where there is one."""
    run, out = RunDir.of(config), Path(options.out)
    checkpoint, tokenizer = run.newest_checkpoint(), run.shards(config) / TOKENIZER_FOLDER
    save_pretrained(load_plm(checkpoint)[0], out, tokenizer if tokenizer.is_dir() else None)
    return {"checkpoint": str(checkpoint), "folder": str(out)}


def save_pretrained(model: Exportable, folder: Path, tokenizer: Path | None = None) -> None:
    """Write the folder from a model that has all columns of its values. `tokenizer`: a folder to take files from.

    Moments of the values, which a model from load_plm does not have, are written, too. Not for several ranks at once.
    Raises DistlmError when the folder exists and is not empty, and when it cannot be written.
    """
    if any(memory.exchange.size > 1 for memory in model.memories.values()):
        raise ValueError("save_pretrained of a model whose memory is shared with other ranks")
    # It may be "." or a link.
    final = folder.resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise DistlmError(f"{folder}: {'not empty' if final.is_dir() else 'a file'}; give another folder, or remove it")
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        # A killed export has left it.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(model, temporary, tokenizer)
        for path in temporary.iterdir():
            sync_file(path)
        sync_folder(temporary)
        temporary.rename(final)
        sync_folder(final.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise DistlmError(f"{folder}: cannot be written ({error}); free space or give another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(model: Exportable, folder: Path, tokenizer: Path | None) -> None:
    transformers_library().utils.logging.disable_progress_bar()
    weights: dict[str, Tensor] = model.hf.state_dict()
    model.hf.save_pretrained(folder, state_dict={n: tensor for n, tensor in weights.items() if _OF_MEMORY not in n})
    own = _without_values(model.hf, weights)
    of_memory = {name: tensor.cpu().contiguous() for name, tensor in own.items() if _OF_MEMORY in name}
    if tokenizer is not None:
        for path in tokenizer.iterdir():
            shutil.copy(path, folder / path.name)
    if not model.memories:
        return
    for memory in model.memories.values():
        # What slots that no update read have moved belongs to their values.
        memory.table.settle()
    extra = {layer: memory.extra_state_tensors() for layer, memory in model.memories.items()}
    save_memories(model.memories, folder, extra)
    safetensors.torch.save_file(of_memory, folder / MEMORY)
    files = sorted(folder.glob("memory*.safetensors"))
    MemoryExport(memory=MemoryConfig(**model.config.memory), files=listing(files)).write(folder / MemoryExport.NAME)


def has_memory(folder: Path | str) -> bool:
    """Whether `save_pretrained` wrote a model with memory there."""
    return any((Path(folder) / name).exists() for name in (MemoryExport.NAME, MEMORY))


def value_hashes(folder: Path) -> dict[str, str]:
    """Name → checksum of the files of a memory's values, as the folder records them."""
    return marked_hashes(folder, "memory-", MemoryExport)


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
    if fault := _differences(model, weights):
        files = f"model.safetensors{f' and {MEMORY}' if memory else ''}"
        described = f"config.json{f' and {MemoryExport.NAME}' if memory else ''}"
        raise DistlmError(f"{folder}: {fault}; {files} and {described} do not belong together, copy the whole folder")
    # Values and running statistics stay as they are; a memory takes no dict without values.
    to_come = {name: tensor for name, tensor in model.hf.state_dict().items() if _OF_MEMORY in name}
    model.hf.load_state_dict(to_come | weights, strict=False)
    return model


def task_head(folder: Path) -> str:
    """How the name of the model's class at Hugging Face ends, where it has the head of a task; empty: it has none.

    Raises DistlmError when there is no config.json that can be read.
    """
    found = read_json(folder / "config.json", "Hugging Face's configuration")
    architecture = str(next(iter(found.get("architectures") or ()), "")) if isinstance(found, dict) else ""
    return next((head for head in TASK_HEADS if architecture.endswith(head)), "")


def read_folder(folder: Path) -> Folder:
    """Read it. The memory's files, those of the values, too, are compared with their checksums.

    Raises DistlmError for missing or damaged files.
    """
    library = transformers_library()
    try:
        backbone = library.AutoConfig.from_pretrained(str(folder)).to_dict()
        weights = safetensors.torch.load_file(folder / "model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise DistlmError(f"{folder}: not a Hugging Face model folder ({error})") from error
    memory = _memory_config(folder)
    if memory:
        check_files(folder, "copy the whole folder, or export the checkpoint again", marker=MemoryExport)
        weights |= safetensors.torch.load_file(folder / MEMORY)
    return Folder(backbone, weights, memory)


def _differences(model: Plm, weights: dict[str, Tensor]) -> str:
    """The first weight that is missing, unknown or of another shape; empty: all fit."""
    own = _without_values(model.hf, model.hf.state_dict())
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


def _without_values(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict what no file of a memory's values has: of memories the parameters alone."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in weights.items() if _OF_MEMORY not in name or name in parameters}


def _memory_config(folder: Path) -> dict[str, Any]:
    path = folder / MemoryExport.NAME
    if not path.exists():
        if (folder / MEMORY).exists():
            raise DistlmError(f"{path}: missing beside {MEMORY}; copy the whole folder")
        return {}
    return dataclasses.asdict(MemoryExport.read(path).memory)
