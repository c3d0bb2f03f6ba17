"""Masked language models from checkpoints: dense weights, and each memory's values from its own files."""

from pathlib import Path

import torch

from distlm.errors import DistlmError
from distlm.memory.of_model import restore_memories
from distlm.memory.placing import values_to_come
from distlm.models.card import model_of_card
from distlm.models.complete import MEMORY, check_files
from distlm.models.io import read_weights
from distlm.models.plm.description import PlmModel
from distlm.models.plm.model import Plm
from distlm.models.records import Complete, ModelCard


def load_plm(folder: Path, device: torch.device | str = "cpu", values: bool = True) -> tuple[Plm, ModelCard]:
    """The model of a checkpoint in eval mode, with its memories, and its card.

    `values`: false leaves the memories' values and statistics in their files. Memory: fp32 weights and values, no
    moments.
    Reads a memory's files twice: their checksums are compared first. Raises DistlmError for another kind of model,
    damaged or missing files, and files of a memory that do not fit.
    """
    weights, card = read_weights(folder)
    config = model_of_card(card)
    if not isinstance(config, PlmModel):
        raise DistlmError(f"{folder}: a {card.kind}, not a masked language model (model.kind=plm)")
    if config.memory:
        check_files(folder, Complete.MEND, MEMORY)
    settings = config.memory
    config.memory = values_to_come(settings)
    model = Plm(config, card.vocabulary)
    config.memory = settings
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]
    if values:
        restore_memories(model.memories, folder, moments=False)
    return model.to(device).eval(), card
