"""What an exported memory has beside its tensors."""

from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.models.records import Marker


class MemoryExport(Marker):
    """The memory of a masked language model that an older version exported as a Hugging Face folder; written last."""

    NAME = "memory.json"
    FILE = "FOLDER/memory.json (of older `distlm export hf`)"
    WHAT = "description of a memory"
    WRITER = "distlm export hf"
    READERS = ("distlm finetune", "distlm train")
    FORMAT = 3
    MEND = "export the checkpoint again (`distlm export hf`)"

    memory: MemoryConfig
    """The section memory."""

    @classmethod
    def of(cls, tree: Any, path: Path) -> Self:
        if isinstance(tree, dict):
            memory, found = tree.get("memory"), tree.get("format", 1)
            unknown = memory.keys() - {field.name for field in fields(MemoryConfig)} if isinstance(memory, dict) else ()
            if found != cls.FORMAT or unknown:
                why = f"unknown field `memory.{min(unknown)}`" if unknown else f"{cls.WHAT} of format {found}"
                raise DistlmError(
                    f"{path}: not a memory of format {cls.FORMAT}; {why}, this version of distlm reads {cls.FORMAT}: "
                    f"{cls.MEND}"
                )
        return super().of(tree, path)
