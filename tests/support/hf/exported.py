"""A model of Hugging Face with memory, exported and loaded as any other."""

from pathlib import Path
from typing import Any

import transformers

from distlm.models.export.folder import write_export
from distlm.models.export.memory import reader_settings, write_model
from distlm.models.export.subclass import subclass
from distlm.models.hf.model import HfLM


def exported(model: HfLM, folder: Path) -> Any:
    """What transformers loads from the export."""
    settings = reader_settings(model.config.memory, model.width)

    def fill(temporary: Path) -> None:
        code = subclass(
            "distlm.models.hf.modeling:ReadsMemory", type(model.hf), type(model.hf.config), "AutoModelForCausalLM"
        )
        code.write(temporary, {**model.hf.config.to_dict(), "memory": settings})
        write_model(temporary, model.hf, model.memories, None, settings)

    write_export(folder, "hf", fill)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
