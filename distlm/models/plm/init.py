"""Where a masked language model's weights start: fresh, a Hugging Face checkpoint, or a model that distlm trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlm.data.shards.wordpiece import TOKENIZER, VOCABULARY, WordPiece
from distlm.errors import DistlmError, UsageError
from distlm.memory.config import MemoryConfig
from distlm.models.card import model_of_card
from distlm.models.io import read_weights
from distlm.models.plm.config import PlmConfig
from distlm.models.plm.description import PlmModel
from distlm.models.plm.export.read import has_memory
from distlm.models.plm.model import Plm, masked_lm_from, transformers_library
from distlm.models.tensor_file import require_finite
from distlm.runtime.progress import say
from distlm.runtime.ranks.world import resolve_world
from distlm.runtime.rundir import RunDir
from distlm.system_errors import refuse

_FFN = (".intermediate.", ".output.dense.", ".ffn.lin1.", ".ffn.lin2.")


def start_from(model: Plm, plm: PlmConfig, memory: MemoryConfig, tokenizer: str) -> None:
    """Copy the weights of plm.init_from (Kim & Jung section 3.3: Init) or plm.checkpoint into a fresh model.

    `tokenizer` is the hash of the tokenizer of the run. The memory stays fresh, and so do the feed-forward networks
    beside it with memory.fresh_ffn (ResM′). Raises DistlmError for a source that cannot be read or has a memory, of
    another architecture, tokenizer or vocabulary, and when both are given.
    """
    if plm.init_from and plm.checkpoint:
        raise UsageError(
            f"plm.init_from={plm.init_from} and plm.checkpoint={plm.checkpoint}: a model starts from one of them; "
            "remove the other"
        )
    if plm.init_from:
        folder = checkpoint_of(Path(plm.init_from))
        weights, card = read_weights(folder)
        described = model_of_card(card)
        if not isinstance(described, PlmModel):
            raise DistlmError(f"plm.init_from={plm.init_from}: a {card.kind}, not a masked language model")
        if card.dictionary != tokenizer or card.vocabulary != model.vocabulary:
            raise DistlmError(
                f"plm.init_from={plm.init_from}: trained with another tokenizer ({card.vocabulary} tokens, hash "
                f"{card.dictionary}) than that of the shards ({model.vocabulary} tokens, hash {tokenizer}); make "
                "shards with its vocabulary (shards.vocabulary)"
            )
        if described.memory:
            raise DistlmError(
                f"plm.init_from={plm.init_from}: has a memory already; train.init_from={plm.init_from} takes it along"
            )
        _copy(model, weights, memory, f"plm.init_from={plm.init_from}")
    elif plm.checkpoint:
        if has_memory(plm.checkpoint):
            raise DistlmError(
                f"plm.checkpoint={plm.checkpoint}: has a memory, which would be lost; continue the run that it was "
                "exported from, fine-tune it as it is (finetune.checkpoint), or start from a model without memory"
            )
        source = masked_lm_from(plm.checkpoint)
        _require_vocabulary(f"plm.checkpoint={plm.checkpoint}", plm.checkpoint, source, model.vocabulary, tokenizer)
        weights = {f"hf.{name}": value.detach() for name, value in source.named_parameters()}
        _copy(model, weights, memory, f"plm.checkpoint={plm.checkpoint}")


def _require_vocabulary(name: str, checkpoint: str, source: Any, size: int, tokenizer: str) -> None:
    """DistlmError unless `source` has the token → id map of the shards' tokenizer, of `size` pieces and that hash."""
    rows = source.config.vocab_size
    path = _tokenizer_file(checkpoint)
    if path is None:
        if rows != size:
            raise DistlmError(
                f"{name}: a vocabulary of {rows}, and the shards have {size}; make shards with the vocab.txt that it "
                "was trained with (shards.vocabulary)"
            )
        say(
            f"{name}: no {VOCABULARY} or {TOKENIZER} there: that its {rows} tokens are those of the shards cannot be "
            "checked",
            resolve_world().rank,
        )
        return
    pieces = _pieces(name, path)
    # The map does not say how text was made ready for it.
    if tokenizer not in [WordPiece(pieces, lower_case).hash for lower_case in (True, False)]:
        made_from = path if path.name == VOCABULARY else f"a {VOCABULARY} of the pieces in {path}, one a line by id"
        raise DistlmError(
            f"{name}: another vocabulary ({len(pieces)} pieces, {path}) than that of the shards ({size} pieces, hash "
            f"{tokenizer}); make shards with shards.vocabulary={made_from}"
        )
    if rows != size:
        raise DistlmError(
            f"{name}: {rows} embeddings for the {size} pieces of its vocabulary; cut them "
            f"(resize_token_embeddings({size}) of transformers), save it and its tokenizer, and give that folder"
        )


def _pieces(name: str, path: Path) -> tuple[str, ...]:
    """The pieces of a tokenizer's file by id. Raises DistlmError for another tokenizer than WordPiece."""
    if path.name == VOCABULARY:
        return WordPiece.load(path, True).pieces
    kind = "BPE"
    if path.name == TOKENIZER:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        # The library raises plain Exception.
        except Exception as error:
            refuse(error, path)
            raise DistlmError(f"{path}: no tokenizer that can be read ({error}); get the checkpoint again") from error
        kind = type(tokenizer.model).__name__
        if kind == "WordPiece":
            ids = tokenizer.get_vocab()
            return tuple(sorted(ids, key=ids.__getitem__))
    raise DistlmError(
        f"{name}: a {kind} vocabulary ({path}), and shards are WordPiece, so none can be made for it; start from a "
        "checkpoint with a WordPiece vocabulary, as BERT's"
    )


def _tokenizer_file(checkpoint: str) -> Path | None:
    """What says the vocabulary of a folder or name on the hub; None: nothing there does."""
    transformers_library()
    from transformers.utils import cached_file

    for name in (VOCABULARY, TOKENIZER, "vocab.json"):
        try:
            found = cached_file(
                checkpoint, name, _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise DistlmError(f"plm.checkpoint={checkpoint}: {name} cannot be read ({error})") from error
        if found is not None:
            return Path(found)
    return None


def checkpoint_of(path: Path) -> Path:
    """A checkpoint folder itself, or the newest one of a run directory. Raises DistlmError when there is none."""
    if (path / "complete.json").exists():
        return path
    found = RunDir(path).complete_checkpoints()
    if not found:
        raise DistlmError(f"plm.init_from={path}: neither a complete checkpoint nor a run directory with one")
    return found[-1]


def _is_ffn(name: str) -> bool:
    # BERT's attention has an output.dense, too.
    return ".attention." not in name and any(part in name for part in _FFN)


def _copy(model: Plm, weights: Mapping[str, Tensor], memory: MemoryConfig, source: str) -> None:
    require_finite(weights, source)
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
