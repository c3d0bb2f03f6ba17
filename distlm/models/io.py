"""Model folders: `model.safetensors` (fp32 weights under the names of named_parameters(), and persistent buffers as
they are under their own) and `model.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.memory.of_model import restore_memories
from distlm.models.buffers import kept_buffers, set_buffers, stored_tensors
from distlm.models.card import CARD, WEIGHTS, model_of_card, read_model_card
from distlm.models.complete import MEMORY, check_files
from distlm.models.described import card_of, causal, model_for_weights, model_on_meta, parameter_count
from distlm.models.kind import Description
from distlm.models.language_model import LanguageModel
from distlm.models.records import Complete, ModelCard
from distlm.models.tensor_file import read_tensors
from distlm.runtime.files import atomic_path, file_hash
from distlm.system_errors import refuse

_LEFT_OUT = (
    " (a persistent buffer, which older versions of distlm left out: import the model, or train it, again with another "
    "run_dir=)"
)


def save_model(model: LanguageModel, folder: Path, extra: Mapping[str, object]) -> None:
    """Write a model folder; `extra`: fields of its card, at least the dictionary's hash ("dictionary") and "step"."""
    config: Description = model.config  # type: ignore[assignment]
    save_weights(stored_tensors(model), config, model.vocabulary, folder, extra)


def save_weights(
    weights: Mapping[str, Tensor], config: Description, vocabulary: int, folder: Path, extra: Mapping[str, Any]
) -> None:
    """Write a model folder from gathered weights: names of stored_tensors → tensor of any dtype and device. Parameters
    are written as fp32, buffers in the dtype that they have.

    Both files are written atomically, the weights first; a folder whose two files do not belong together (a crash
    between them) is refused by load_model. Raises ValueError when names or shapes are not those of the model.
    """
    model = model_on_meta(config, vocabulary)
    if problem := _differences(model, {name: tuple(tensor.shape) for name, tensor in weights.items()}):
        raise ValueError(f"weights do not fit the model: {problem}")
    if clash := [key for key in ("kind", "config", "vocabulary", "weights") if key in extra]:
        raise ValueError(f"extra must not hold {clash}")
    if "dictionary" not in extra:
        raise ValueError("extra must hold the hash of the dictionary")
    ordered = {name: _for_disk(weights[name], torch.float32) for name, _ in model.named_parameters()}
    ordered |= {name: _for_disk(weights[name]) for name in kept_buffers(model)}
    with atomic_path(folder / WEIGHTS) as temporary:
        safetensors.torch.save_file(ordered, temporary)
        digest = file_hash(temporary)
    card_of(config, vocabulary, weights=digest, **extra).write(folder / CARD)


def load_model(
    folder: Path, device: torch.device | str = "cpu", values: bool = True
) -> tuple[LanguageModel, ModelCard]:
    """The model that predicts the next word in eval mode on `device` (fp32), with the values of its memories, and its
    card.

    `values`: false leaves the memories' values and statistics in their files.
    A memory's files are read twice: their checksums are compared first. Raises DistlmError for missing files, another
    kind of model, files that changed since they were written (checksum), and weights or memories that do not fit the
    recorded configuration.
    """
    model, weights, card = _read(folder, device)
    causal(model_of_card(card))
    _assign(model, weights)
    if memories := getattr(model, "memories", None):
        check_files(folder, Complete.MEND, MEMORY)
        if values:
            restore_memories(memories, folder, moments=False)
    # Buffers that are not kept are where the model was built.
    return model.to(device).eval(), card


def read_weights(folder: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], ModelCard]:
    """The weights of a model folder by parameter name (fp32) with the model's kept_buffers, and its card; errors of
    load_model."""
    return _read(folder, device)[1:]


def _read(folder: Path, device: torch.device | str) -> tuple[Any, dict[str, Tensor], ModelCard]:
    """The model whose parameters are yet to be assigned, its weights, and its card."""
    card = read_model_card(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise DistlmError(f"{path}: no such file (weights of the model); copy the whole checkpoint folder")
    if (found := file_hash(path)) != card.weights:
        raise DistlmError(
            f"{path}: checksum {found} differs from {card.weights} in {CARD}: the file is damaged or belongs to "
            "another checkpoint; copy the folder again or use another checkpoint"
        )
    try:
        # safetensors reads to the devices that it knows by name; every other is torch's alone.
        weights = {name: tensor.to(device) for name, tensor in read_tensors(path).items()}
    except safetensors.SafetensorError as error:
        refuse(error, path)
        raise DistlmError(f"{folder}: not a checkpoint of this version of distlm: {error}") from error
    model = _built(folder / CARD, card, len(weights))
    if problem := _differences(model, {name: tuple(tensor.shape) for name, tensor in weights.items()}):
        raise DistlmError(f"{path}: weights do not fit the model that {CARD} describes: {problem}")
    return model, weights, card


def _built(path: Path, card: ModelCard, tensors: int) -> Any:
    """The model that model.json describes, which has not more layers than there are `tensors`. Raises DistlmError
    naming the file when its numbers cannot be those of a model."""
    layers = card.config.get("layers", 0)
    if isinstance(layers, int) and layers > tensors:
        raise DistlmError(
            f"{path}: config: {layers} layers, and {WEIGHTS} has {tensors} tensors in all; {Complete.MEND}"
        )
    try:
        return model_for_weights(model_of_card(card), card.vocabulary)
    except (DistlmError, OSError):
        raise
    except Exception as error:
        # Each library has an error of its own for sizes that cannot be.
        raise DistlmError(f"{path}: config: no {card.kind} can be built so ({error}); {Complete.MEND}") from error


def card_parameters(card: ModelCard) -> int:
    """Parameters of the model of `card`, shared ones counted once."""
    return parameter_count(model_of_card(card), card.vocabulary)


def check_dictionary(card: ModelCard, dictionary: Dictionary) -> None:
    """Raises DistlmError when the model of `card` was trained with another dictionary.

    The same words in another order would run and give a perplexity about ten times too high.
    """
    if card.dictionary != dictionary.hash or card.vocabulary != len(dictionary):
        raise DistlmError(
            f"wrong dictionary for a model: the model was trained with {card.vocabulary} words (hash "
            f"{card.dictionary}), the token files have {len(dictionary)} (hash {dictionary.hash}); "
            "set data.tokens_dir to the token files that the model was trained on"
        )


def _differences(model: nn.Module, found: Mapping[str, tuple[int, ...]]) -> str:
    """The first name or shape in which `found` differs from the model's stored_tensors, or an empty string."""
    expected = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()}
    buffers = kept_buffers(model)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} {list(expected[name])} is missing{_LEFT_OUT if name in buffers else ''}"
        if name not in expected:
            return f"{name} {list(found[name])} is unknown"
        if expected[name] != found[name]:
            return f"{name} has shape {list(found[name])}, expected {list(expected[name])}"
    return ""


def _for_disk(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    tensor = tensor.detach().to("cpu", dtype).contiguous()
    # safetensors refuses tensors that share memory, as slices of a flat ZeRO partition do.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _assign(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace every parameter and kept buffer by its tensor, in all modules that share it."""
    set_buffers(model, weights)
    loaded = {id(parameter): nn.Parameter(weights[name]) for name, parameter in model.named_parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, loaded[id(parameter)])
