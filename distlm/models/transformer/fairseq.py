"""Weights of fairseq's transformer language models with adaptive input and softmax (`transformer_lm_wiki103`).

A checkpoint of fairseq is a dict: "model" (the state dict), "args" (an argparse.Namespace; "cfg" in newer versions)
and what its trainer needs. Nothing in it is run: tensors, plain containers and Namespaces are read, the trainer's
meters become empty shells, every other class is refused.
"""

import argparse
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.models.tensor_file import require_tensor_file
from distlm.models.transformer.config import TransformerConfig
from distlm.system_errors import refuse

_METERS = ("AverageMeter", "TimeMeter", "StopwatchMeter")
_LAYER_NAMES = {
    "self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out.",
    "self_attn_layer_norm.": "attention_norm.", "final_layer_norm.": "ffn_norm.", "fc1.": "fc1.", "fc2.": "fc2.",
}  # fmt: skip
"""fairseq's names within a layer → ours."""
_LAYER = re.compile(rf"decoder\.layers\.(\d+)\.({'|'.join(map(re.escape, _LAYER_NAMES))})(weight|bias)")
_SPLIT = re.compile(r"(decoder\.layers\.\d+\.self_attn\.)q_proj\.(weight|bias)")
_EMBEDDING = re.compile(r"decoder\.embed_tokens\.embeddings\.(\d+)\.([01])\.weight")
_TIED = re.compile(r"decoder\.adaptive_softmax\.(?:head\.word_proj|tail\.(\d+)\.([02]))\.weight")
_CLASSES = "decoder.adaptive_softmax.head.class_proj.weight"
_BUFFER = re.compile(r"decoder\.(?:version|.*\._float_tensor|adaptive_softmax\.buffer)")


class _Shell:
    """Stands for a meter of fairseq's trainer; holds what it held, does nothing."""


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a checkpoint, and the settings of its model ({} when it has none).

    Raises DistlmError for a missing file, one that is no checkpoint of fairseq, and one with pickled classes.
    """
    require_tensor_file(path)
    known = [argparse.Namespace, *((_Shell, f"fairseq.meters.{name}") for name in _METERS)]
    try:
        with torch.serialization.safe_globals(known):  # type: ignore[arg-type]
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise DistlmError(
            f"{path}: holds pickled objects of {name[1] if name else 'some class'}, which run code when they are read; "
            "where fairseq is installed run `c = torch.load(FILE); torch.save({'args': c['args'], 'model': "
            "c['model']}, 'model.pt')` and import that file"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        refuse(error, path)
        raise DistlmError(f"{path}: not a file of tensors: {error}") from error
    tensors = found.get("model") if isinstance(found, Mapping) else None
    if not isinstance(tensors, Mapping) or not tensors or not all(torch.is_tensor(value) for value in tensors.values()):
        raise DistlmError(f"{path}: not a checkpoint of fairseq, which has the weights under 'model'")
    args = found.get("args") or (found.get("cfg") or {}).get("model")
    return dict(tensors), dict(vars(args) if isinstance(args, argparse.Namespace) else args or {})


def our_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors under the names of TransformerLM, fp32; q, k and v of a layer in one.

    Raises DistlmError for names of another architecture, an untied softmax, and a missing part.
    """
    tensors = _joined(tensors)
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _LAYER.fullmatch(name):
            ours[f"layers.{match[1]}.{_LAYER_NAMES[match[2]]}{match[3]}"] = tensor.float()
        elif match := _EMBEDDING.fullmatch(name):
            ours[f"embedding.{'embedding' if match[2] == '0' else 'projection'}_{match[1]}"] = tensor.float()
        elif name == _CLASSES:
            ours["softmax.class_weight"] = tensor.float()
        elif not _TIED.fullmatch(name) and not _BUFFER.fullmatch(name):
            raise DistlmError(
                f"{path}: {name} is no part of a transformer_lm_wiki103 (adaptive input and tied adaptive softmax, "
                "sinusoidal positions, no last layer norm); models of another architecture are not read"
            )
    for need in ("embedding.embedding_0", "embedding.projection_0", "layers.0.attention.qkv.weight"):
        if need not in ours:
            raise DistlmError(f"{path}: no {need.rpartition('.')[2]} in it; not the checkpoint of a language model")
    for name, tensor in tensors.items():
        if match := _TIED.fullmatch(name):
            band = 0 if match[1] is None else int(match[1]) + 1
            same = ours.get(f"embedding.{'projection' if match[2] == '0' else 'embedding'}_{band}")
            if same is None or not torch.equal(tensor.float(), same):
                raise DistlmError(
                    f"{path}: {name} is not that of the input; only models trained with --tie-adaptive-weights and "
                    "--tie-adaptive-proj are read"
                )
    return ours


def check_sizes(weights: Mapping[str, Tensor], args: Mapping[str, Any], model: TransformerConfig, path: Path) -> None:
    """Raises DistlmError, naming the settings to use, when the file's model is not that of `model`."""
    words = _bands(weights)
    widths = [weights[f"embedding.embedding_{band}"].shape[1] for band in range(len(words))]
    edges = [sum(words[: band + 1]) for band in range(len(words))]
    here: dict[str, Any] = {
        "layers": model.layers, "width": model.width, "ffn_width": model.ffn_width,
        "cutoffs": [edge for edge in model.cutoffs if edge < edges[-1]], "heads": model.heads,
    }  # fmt: skip
    there: dict[str, Any] = {
        "layers": len({name.split(".")[1] for name in weights if name.startswith("layers.")}),
        "width": widths[0], "ffn_width": weights["layers.0.fc1.weight"].shape[0], "cutoffs": edges[:-1],
        # No shape tells the number of heads.
        "heads": args.get("decoder_attention_heads", model.heads),
    }  # fmt: skip
    if len(widths) > 1:
        here["factor"], there["factor"] = model.factor, widths[0] // widths[1]
    other = [f"model.{name}={str(value).replace(' ', '')}" for name, value in there.items() if here[name] != value]
    if other:
        found = ", ".join(f"model.{name}={here[name]}" for name in there if here[name] != there[name])
        raise DistlmError(f"{path}: a model of other sizes than {found}; import it with {' '.join(other)}")


def check_order(words: Sequence[str], dictionary: Dictionary, rows: int, source: str, path: Path) -> None:
    """Raises DistlmError, naming the first word that differs, unless fairseq's dictionary `words` gives the ids of the
    token files: the same words in another order run, at about ten times the perplexity. `rows` are those of the model.
    """
    if len(words) != rows:
        raise DistlmError(
            f"{source}: {len(words)} words with the four special ones, {path} has {rows}: another model's"
        )
    for number, (theirs, ours) in enumerate(zip(words, dictionary.words, strict=False)):
        if theirs != ours:
            raise DistlmError(
                f"{source}: id {number} is {theirs!r} there and {ours!r} in the token files: another order of words; "
                f"prepare the text with it, in a new folder: data.dictionary={source}"
            )
    if len(dictionary) != rows:
        raise DistlmError(
            f"{source}: {rows} words, the token files have {len(dictionary)}; prepare the text with it, in a new "
            f"folder: data.dictionary={source}"
        )


def vocabulary_size(weights: Mapping[str, Tensor]) -> int:
    """Words of all bands."""
    return sum(_bands(weights))


def _bands(weights: Mapping[str, Tensor]) -> list[int]:
    """Words of each band."""
    count = sum(name.startswith("embedding.embedding_") for name in weights)
    return [len(weights[f"embedding.embedding_{band}"]) for band in range(count)]


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With q, k and v of each layer in one tensor, as versions before 2020 stored them."""
    joined = dict(tensors)
    for name in tensors:
        if match := _SPLIT.fullmatch(name):
            parts = [joined.pop(f"{match[1]}{part}_proj.{match[2]}", None) for part in "qkv"]
            if not any(part is None for part in parts):
                joined[f"{match[1]}in_proj_{match[2]}"] = torch.cat([part for part in parts if part is not None])
    return joined
