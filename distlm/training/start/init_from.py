"""Starting from the weights of another training (train.init_from): the same kind of model, a schedule of its own."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from distlm.errors import DistlmError
from distlm.models.buffers import kept_buffers, stored_tensors
from distlm.models.complete import check_files
from distlm.models.records import Complete, ModelCard
from distlm.models.tensor_file import require_finite
from distlm.runtime.records import BestCheckpoint
from distlm.runtime.rundir import RunDir
from distlm.training.checkpoint import BEST


def source_checkpoint(place: str) -> Path:
    """The checkpoint that train.init_from names: itself, or of a run directory the best one, else the newest.

    Raises DistlmError when there is none, or when it is not whole.
    """
    folder = _checkpoint_of(Path(place))
    check_files(folder, f"copy the whole folder again, or use another train.init_from than {place}")
    return folder


def _checkpoint_of(path: Path) -> Path:
    if (path / Complete.NAME).exists():
        return path
    run = RunDir(path)
    found = run.complete_checkpoints()
    if not found:
        raise DistlmError(f"train.init_from={path}: neither a complete checkpoint nor a run directory with one")
    best = run.checkpoints / BEST
    chosen = run.checkpoints / BestCheckpoint.read(best).checkpoint if best.exists() else found[-1]
    return chosen if chosen in found else found[-1]


def take_weights(
    model: nn.Module, weights: Mapping[str, Tensor], card: ModelCard, dictionary: str, source: str
) -> None:
    """Copy `weights` (as read_weights gives them, of a checkpoint with that card) into a fresh model.

    `dictionary`: hash of the dictionary or tokenizer of the present text. Raises DistlmError, naming `source`, for
    another dictionary, and for names or shapes that are not the model's.
    """
    require_dictionary(card, dictionary, source)
    own, buffers = stored_tensors(model), kept_buffers(model)
    require_finite({name: tensor for name, tensor in weights.items() if name not in buffers}, source)
    for name in sorted(own.keys() | weights.keys()):
        there, here = (list(found[name].shape) if name in found else "missing" for found in (weights, own))
        if there != here:
            raise DistlmError(
                f"{source}: {name} is {there} there, {here} here: another model; give the settings of the model as "
                "they are there"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def require_dictionary(card: ModelCard, dictionary: str, source: str) -> None:
    """Raises DistlmError, naming `source`, when the model of `card` has another dictionary or tokenizer."""
    if card.dictionary != dictionary:
        raise DistlmError(
            f"{source}: trained with another dictionary or tokenizer (hash {card.dictionary}) than that of the text "
            f"(hash {dictionary}); make the token files or shards with the one that it was trained with"
        )
