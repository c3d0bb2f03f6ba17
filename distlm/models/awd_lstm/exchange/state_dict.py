"""Weights of an AWD-LSTM from a state dict with the key names of salesforce/awd-lstm-lm or of fastai."""

import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.models.awd_lstm.config import LstmConfig
from distlm.models.awd_lstm.model import FIRST_ID
from distlm.models.tensor_file import require_tensor_file
from distlm.system_errors import refuse

_LAYER = re.compile(r"(?:0\.)?rnns\.(\d+)\.(?:module\.)?(weight_ih|weight_hh|bias_ih|bias_hh)_l0(_raw)?")
_QRNN = re.compile(r"(?:0\.)?rnns\.\d+\.(?:module\.|layers\.\d+\.)*linear\.")
_EMBEDDING = re.compile(r"(?:0\.)?encoder\.weight")
_TIED = re.compile(r"(?:1\.)?decoder\.weight|(?:0\.)?encoder_dp\.emb\.weight")
_BIAS = re.compile(r"(?:1\.)?decoder\.bias")
_SAME_WORD = {"<eos>": Dictionary.SPECIALS[Dictionary.EOS], "xxunk": Dictionary.SPECIALS[Dictionary.UNK]}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a state dict (`torch.save(model.state_dict(), …)` or .safetensors); fastai's {"model": …} is opened.

    Nothing is unpickled but tensors and plain containers. Raises DistlmError for a missing file, one that holds
    pickled classes, as the authors' `torch.save([model, criterion, optimizer])` does, and one that is no state dict.
    """
    require_tensor_file(path)
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DistlmError(
            f"{path}: holds pickled Python classes (a whole model), which run code when they are read; in the "
            "environment that wrote it run `torch.save(model.state_dict(), 'state.pt')` and import that file"
        ) from error
    except (RuntimeError, EOFError, OSError, safetensors.SafetensorError) as error:
        refuse(error, path)
        raise DistlmError(f"{path}: not a file of tensors: {error}") from error
    if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    if not isinstance(found, Mapping) or not all(torch.is_tensor(value) for value in found.values()):
        raise DistlmError(
            f"{path}: not a state dict (name → tensor) but {type(found).__name__}; save model.state_dict()"
        )
    return dict(found)


def check_vocabulary(tensors: Mapping[str, Tensor], dictionary: Dictionary, path: Path) -> None:
    """DistlmError for an embedding of another number of words than the dictionary's: the first thing to know of a
    model of another text. The special ids before FIRST_ID have no row."""
    rows = next((len(tensor) for name, tensor in tensors.items() if _EMBEDDING.fullmatch(name)), None)
    ours = len(dictionary) - FIRST_ID
    if rows is not None and rows != ours:
        raise DistlmError(
            f"{path}: vocabulary mismatch: the embedding has {rows} rows, the dictionary of the token files {ours} "
            "words; import with the text that the model was trained on (data.pad_to_multiple=1), or another model"
        )


def our_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors under the names of AwdLstm, the undropped (`_raw`) hidden-to-hidden weights, fp32.

    Raises DistlmError for names of another model, an untied decoder, or a missing part.
    """
    ours: dict[str, Tensor] = {}
    tied: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _LAYER.fullmatch(name):
            key = f"layers.{match[1]}.{match[2]}"
            # Beside a raw weight lies the last dropped one.
            if match[3] or key not in ours:
                ours[key] = tensor.float()
        elif _EMBEDDING.fullmatch(name):
            ours["embedding"] = tensor.float()
        elif _BIAS.fullmatch(name):
            ours["decoder_bias"] = tensor.float()
        elif _TIED.fullmatch(name):
            tied[name] = tensor.float()
        else:
            why = "its layers are QRNN, which is not supported" if _QRNN.match(name) else "the model is another"
            raise DistlmError(f"{path}: {name} is no part of an AWD-LSTM with LSTM layers and one softmax: {why}")
    if missing := [name for name in ("embedding", "decoder_bias", "layers.0.weight_hh") if name not in ours]:
        raise DistlmError(f"{path}: {', '.join(missing)} missing; an encoder without its decoder is no language model")
    for name, tensor in tied.items():
        if not torch.equal(tensor, ours["embedding"]):
            raise DistlmError(f"{path}: {name} differs from the embedding; only tied models are supported")
    return ours


def check_sizes(weights: Mapping[str, Tensor], lstm: LstmConfig, path: Path) -> None:
    """Raises DistlmError, naming the settings to use, when the file's model is not that of `lstm`."""
    layers = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    found = {
        "lstm.layers": (lstm.layers, layers),
        "lstm.width": (lstm.width, weights["embedding"].shape[1]),
        "lstm.hidden_width": (lstm.hidden_width, weights["layers.0.weight_hh"].shape[1]),
    }
    if layers == 1:
        del found["lstm.hidden_width"]
    other = [f"{name}={there}" for name, (here, there) in found.items() if here != there]
    if other:
        here = ", ".join(f"{name}={value[0]}" for name, value in found.items())
        raise DistlmError(f"{path}: a model of other sizes than {here}; import it with {' '.join(other)}")


def first_seen(lines: Iterable[str]) -> list[str]:
    """Words in the order of salesforce's corpus: as they first come, each line with its <eos>."""
    words: dict[str, None] = {}
    for line in lines:
        words.update(dict.fromkeys([*line.split(), "<eos>"]))
    return list(words)


def in_our_order(
    weights: Mapping[str, Tensor], words: Sequence[str], dictionary: Dictionary, path: Path, source: str
) -> dict[str, Tensor]:
    """Embedding and decoder bias with the rows of `words` moved to the dictionary's ids.

    Raises DistlmError when rows, words and dictionary are not the same set.
    """
    rows = {_SAME_WORD.get(word, word): row for row, word in enumerate(words)}
    count, ours = len(weights["embedding"]), dictionary.words[FIRST_ID:]
    if len(rows) != count or len(ours) != count:
        raise DistlmError(
            f"{path}: vocabulary mismatch: the embedding has {count} rows, {source} {len(rows)} words and the "
            f"dictionary {len(ours)}; import with the vocabulary and the text that the model was trained on "
            "(data.pad_to_multiple=1)"
        )
    if absent := [word for word in ours if word not in rows]:
        shown = ", ".join(map(repr, absent[:3]))
        raise DistlmError(
            f"{path}: vocabulary mismatch: {len(absent)} words of the dictionary are not in {source} ({shown}); import "
            "with the vocabulary and the text that the model was trained on"
        )
    order = torch.tensor([rows[word] for word in ours])
    return {**weights, "embedding": weights["embedding"][order], "decoder_bias": weights["decoder_bias"][order]}
