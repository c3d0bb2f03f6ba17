"""Exported folders as older versions of distlm wrote them: a memory in files of its own beside the model's."""

import shutil
from pathlib import Path
from typing import Any

import safetensors.torch

from distlm.memory.config import MemoryConfig
from distlm.memory.of_model import save_memories
from distlm.models.complete import listing
from distlm.models.plm.records import MemoryExport


def save_old(model: Any, folder: Path, tokenizer: Path | None = None) -> None:
    """A masked language model, or a fine-tuned one, with a memory."""
    folder.mkdir()
    weights = model.hf.state_dict()
    of_memory = {name: tensor.detach() for name, tensor in model.hf.named_parameters() if ".memory." in name}
    model.hf.save_pretrained(folder, state_dict={n: t for n, t in weights.items() if ".memory." not in n})
    for path in tokenizer.iterdir() if tokenizer is not None else ():
        shutil.copy(path, folder / path.name)
    for memory in model.memories.values():
        memory.table.settle()
    save_memories(model.memories, folder, {n: memory.extra_state_tensors() for n, memory in model.memories.items()})
    safetensors.torch.save_file(of_memory, folder / "memory.safetensors")
    files = listing(sorted(folder.glob("memory*.safetensors")))
    MemoryExport(memory=MemoryConfig(**model.config.memory), files=files).write(folder / MemoryExport.NAME)
