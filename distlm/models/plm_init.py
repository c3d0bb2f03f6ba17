"""Where a masked language model's weights start: fresh, a Hugging Face checkpoint, or a model that distlm trained."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distlm.config.plm import MemoryConfig, PlmConfig
from distlm.errors import DistlmError
from distlm.models.io import read_weights
from distlm.models.plm import Plm, masked_lm_from

_FFN = (".intermediate.", ".output.dense.", ".ffn.lin1.", ".ffn.lin2.")


def start_from(model: Plm, plm: PlmConfig, memory: MemoryConfig, tokenizer: str) -> None:
    """Copy the weights of plm.init_from (Kim & Jung section 3.3: Init) or plm.checkpoint into a fresh model.

    `tokenizer` is the hash of the tokenizer of the run. Memory that the source lacks stays fresh, and so do the
    feed-forward networks beside it with memory.fresh_ffn (ResM′). Raises DistlmError for a source that cannot be
    read, of another architecture, tokenizer or vocabulary, and when both are given.
    """
    if plm.init_from and plm.checkpoint:
        raise DistlmError(
            f"plm.init_from={plm.init_from} and plm.checkpoint={plm.checkpoint}: a model starts from one of them; "
            "remove the other"
        )
    if plm.init_from:
        folder = checkpoint_of(Path(plm.init_from))
        weights, card = read_weights(folder)
        if card["kind"] != "plm":
            raise DistlmError(f"plm.init_from={plm.init_from}: a {card['kind']}, not a masked language model")
        if card["dictionary"] != tokenizer or card["vocabulary"] != model.vocabulary:
            raise DistlmError(
                f"plm.init_from={plm.init_from}: trained with another tokenizer ({card['vocabulary']} tokens, hash "
                f"{card['dictionary']}) than that of the shards ({model.vocabulary} tokens, hash {tokenizer}); make "
                "shards with its vocabulary (shards.vocabulary)"
            )
        if card["config"]["memory"]:
            raise DistlmError(
                f"plm.init_from={plm.init_from}: has a memory already; continue that run itself, or start from the "
                "model without memory"
            )
        _copy(model, weights, memory, f"plm.init_from={plm.init_from}")
    elif plm.checkpoint:
        source = masked_lm_from(plm.checkpoint)
        if source.config.vocab_size != model.vocabulary:
            raise DistlmError(
                f"plm.checkpoint={plm.checkpoint}: a vocabulary of {source.config.vocab_size}, and the shards have "
                f"{model.vocabulary}; make shards with its vocabulary (shards.vocabulary)"
            )
        weights = {f"hf.{name}": value.detach() for name, value in source.named_parameters()}
        _copy(model, weights, memory, f"plm.checkpoint={plm.checkpoint}")


def checkpoint_of(path: Path) -> Path:
    """A checkpoint folder itself, or the newest one of a run directory. Raises DistlmError when there is none."""
    if (path / "complete.json").exists():
        return path
    found = sorted(marker.parent for marker in path.glob("checkpoints/step-*/complete.json"))
    if not found:
        raise DistlmError(f"plm.init_from={path}: neither a complete checkpoint nor a run directory with one")
    return found[-1]


def _is_ffn(name: str) -> bool:
    # BERT's attention has an output.dense, too.
    return ".attention." not in name and any(part in name for part in _FFN)


def _copy(model: Plm, weights: Mapping[str, Tensor], memory: MemoryConfig, source: str) -> None:
    own = dict(model.named_parameters())
    with_memory = tuple(f".layer.{position - 1}." for position in model.memories)
    with torch.no_grad():
        for name, parameter in own.items():
            of_memory = ".memory." in name
            fresh_ffn = memory.fresh_ffn and any(part in name for part in with_memory) and _is_ffn(name)
            if of_memory or fresh_ffn:
                continue
            if name not in weights or weights[name].shape != parameter.shape:
                found = list(weights[name].shape) if name in weights else "missing"
                raise DistlmError(
                    f"{source}: {name} is {found} there, {list(parameter.shape)} here; set plm.* as there"
                )
            parameter.copy_(weights[name])
    # With PKM the source's feed-forward networks of the memory's layers are not used.
    unused = [n for n in weights if n not in own and not any(part in n for part in with_memory)]
    if unused:
        raise DistlmError(f"{source}: {unused[0]} has no place in this model: another architecture")
