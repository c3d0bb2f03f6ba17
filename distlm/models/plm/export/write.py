"""Masked language models, fine-tuned ones, too, as Hugging Face folders (distlm.models.export.folder).

Without memory they are what transformers' save_pretrained writes. A memory makes another architecture of a model:
model_type is distlm_bert, …, its classes, made from transformers' own and distlm.models.plm.export.modeling, lie in the
folder. So a program that does not know them refuses the model instead of reading it without its memory.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from distlm.data.shards.files import TOKENIZER_FOLDER
from distlm.memory.layer import ProductKeyMemory
from distlm.models.export.card import Card, run_card
from distlm.models.export.folder import Code, write_export
from distlm.models.export.memory import memory_words, reader_settings, write_model
from distlm.models.export.run import export_model
from distlm.models.export.subclass import subclass
from distlm.models.plm.config import PlmRun
from distlm.models.plm.description import PlmModel
from distlm.models.plm.io import load_plm
from distlm.models.plm.model import transformers_library
from distlm.runtime.rundir import RunDir

_AUTO = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}


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
        """Its description; has KIND and the section memory."""


def export_run(config: PlmRun, options: argparse.Namespace) -> dict[str, object]:
    """`distlm export hf --out FOLDER`: the newest checkpoint of a run, with its tokenizer where there is one."""
    run = RunDir.of(config)
    checkpoint, tokenizer = run.newest_checkpoint(), run.shards(config) / TOKENIZER_FOLDER
    given = tokenizer if tokenizer.is_dir() else None

    def write(folder: Path) -> None:
        model = load_plm(checkpoint, values=False)[0]
        save_pretrained(model, folder, given, run_card(config, checkpoint, _words(model.config)), checkpoint)

    return export_model(options, checkpoint, write)


def save_pretrained(
    model: Exportable, folder: Path, tokenizer: Path | None = None, card: Card | None = None,
    checkpoint: Path | None = None,
) -> None:  # fmt: skip
    """Write the folder. Not for several ranks at once.

    `tokenizer`: a folder to take files from. `checkpoint`: where the values of the memories are read from, a part at a
    time; None: the model has all their columns. Raises DistlmError when the folder exists and is not empty, and when it
    cannot be written.
    """

    def fill(temporary: Path) -> None:
        transformers_library().utils.logging.disable_progress_bar()
        if tokenizer is not None:
            for path in tokenizer.iterdir():
                shutil.copy(path, temporary / path.name)
        code = _write_with_memory(model, checkpoint, temporary) if model.memories else None
        if code is None:
            model.hf.save_pretrained(temporary)
        if card is not None:
            card.write(temporary, folder.name, auto_class(model.hf), code is not None)

    write_export(folder, model.config.KIND, fill)


def _words(described: PlmModel) -> str:
    """The model in words."""
    memory = reader_settings(described.memory, 1) if described.memory else {}
    return f"A masked language model ({described.backbone['model_type']}){memory_words(memory)}."


def auto_class(hf: Any) -> str:
    """The class of transformers that loads a model."""
    name = type(hf).__name__
    return next(auto for head, auto in _AUTO.items() if name.endswith(head))


def _write_with_memory(model: Exportable, checkpoint: Path | None, folder: Path) -> Code:
    hf = model.hf
    memory = reader_settings(model.config.memory, hf.config.hidden_size)
    code = modeling(type(hf), type(hf.config))
    code.write(folder, {**hf.config.to_dict(), "memory": memory})
    write_model(folder, hf, model.memories, checkpoint, memory)
    return code


def modeling(model_class: type, config_class: type) -> Code:
    """The code of a model class of transformers with memories."""
    auto = next(auto for head, auto in _AUTO.items() if model_class.__name__.endswith(head))
    return subclass("distlm.models.plm.export.modeling:ReadsMemory", model_class, config_class, auto)
