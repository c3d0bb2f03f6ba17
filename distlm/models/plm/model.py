"""Masked language models: a Hugging Face BERT, DistilBERT or RoBERTa, with product-key memory at chosen layers.

Weights keep the names that Hugging Face gives them, below `hf.`; distlm.models.plm.with_memory says where a memory
stands in a layer.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor, nn

from distlm.errors import DistlmError
from distlm.installed import install
from distlm.memory.config import MemoryConfig
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.of_model import layers_and_values, make_memories
from distlm.memory.placing import placed, require_layers
from distlm.memory.values.exchange import Exchange
from distlm.models.export.folder import plain_config
from distlm.models.linear_cross_entropy import cross_entropy_sum
from distlm.models.plm.attention import NAME, register
from distlm.models.plm.config import PlmConfig
from distlm.models.plm.description import Backbone, PlmModel
from distlm.models.plm.text.masking import NO_LABEL
from distlm.models.plm.with_memory import add_memory, layers_of
from distlm.models.row_dropout import RowDropout, Rows, memory_dropout

_BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_DROPOUTS = {
    "bert": _BERT_DROPOUTS, "roberta": _BERT_DROPOUTS,
    "distilbert": ("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"),
}  # fmt: skip
"""By architecture: Hugging Face's names of the dropout probabilities."""


class Plm(nn.Module):
    """A masked language model and its memories."""

    def __init__(self, config: PlmModel, vocabulary: int, exchange: Exchange | None = None) -> None:
        """Fresh weights from torch's global generator, dense ones first: those do not depend on the memory.

        `exchange` joins the ranks that train it; None: this process has all of the memory.
        Raises DistlmError for a memory that does not fit the backbone.
        """
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.rows = Rows()
        self.hf = _masked_lm(config.backbone, vocabulary)
        hf_config = self.hf.config
        self.width: int = hf_config.hidden_size
        self.head = MlmHead(self.hf)
        self.memories = equip(self.hf, config.memory, config.seed, self.rows, exchange)
        """Layer, counted from 1 → its memory; the modules themselves hang in the backbone."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T] → last hidden states [B, T, D]. Within `rows.set`, which says what is padding."""
        mask = self.rows.mask
        if mask is None:
            raise ValueError("Plm.forward outside Rows.set")
        # A short piece of a padded row may be padding alone, and a softmax over nothing is NaN.
        seen = mask | ~mask.any(1, keepdim=True)
        states: Tensor = self.hf.base_model(input_ids=tokens, attention_mask=seen).last_hidden_state
        return states

    def loss_sum(self, states: Tensor, labels: Tensor) -> Tensor:
        """Σ −ln p(label) over the positions that have a label: fp64 scalar. labels int64 [B, T], or NO_LABEL."""
        chosen = labels != NO_LABEL
        total: Tensor = self.head(states[chosen], labels[chosen])
        return total

    @property
    def memory_numbers(self) -> int:
        """Values in all memories, numbers of fp32; they are no parameters."""
        return layers_and_values(self.config.memory, self.width)[1]


class MlmHead(nn.Module):
    """The head of a masked language model: transform, and softmax over the vocabulary without [tokens, V].

    It holds the backbone's own modules and weights, so that ZeRO 3 gathers them for its forward.
    """

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        kind = hf.config.model_type  # type: ignore[union-attr]
        parts: Any = hf
        if kind == "bert":
            head = parts.cls.predictions
            self.transform, decoder = head.transform, head.decoder
        elif kind == "roberta":
            self.transform = nn.Sequential(parts.lm_head.dense, nn.GELU(), parts.lm_head.layer_norm)
            decoder = parts.lm_head.decoder
        else:
            self.transform = nn.Sequential(parts.vocab_transform, parts.activation, parts.vocab_layer_norm)
            decoder = parts.vocab_projector
        self.weight, self.bias = decoder.weight, decoder.bias

    def forward(self, states: Tensor, targets: Tensor) -> Tensor:
        """states [n, D], targets int64 [n] → Σ −ln p(target): fp64 scalar."""
        return cross_entropy_sum(self.transform(states), self.weight, self.bias, targets)


def equip(
    hf: Any, memory: Mapping[str, Any], seed: int, rows: Rows, exchange: Exchange | None
) -> dict[int, ProductKeyMemory]:
    """Give a fresh Hugging Face model dropout masks by row, and the layers of `memory` (MemoryConfig; empty: none)
    their memories: layer, counted from 1 → memory.

    Raises DistlmError for a memory that does not fit the model.
    """
    for name, module in list(hf.named_modules()):
        if type(module) is nn.Dropout:
            _put(hf, name, RowDropout(module.p, rows, name))
    if not memory:
        return {}
    config, layers = MemoryConfig(**memory), layers_of(hf)
    if hf.config.chunk_size_feed_forward:
        raise DistlmError("chunk_size_feed_forward of the Hugging Face configuration must be 0 with a memory")
    require_layers(config.positions, len(layers))
    memories = make_memories(config, hf.config.hidden_size, seed, exchange, partial(memory_dropout, rows))
    for position, made in memories.items():
        add_memory(layers[position - 1], made, dataclasses.asdict(config), rows.of_text)
    return memories


def plm_model(plm: PlmConfig, memory: MemoryConfig, seed: int, pad_id: int = 0) -> PlmModel:
    """The model that a configuration asks for. Raises DistlmError when plm.checkpoint cannot be read."""
    backbone = _read_backbone(plm.checkpoint) if plm.checkpoint else _fresh_backbone(plm, pad_id)
    layers = backbone.get("n_layers") or backbone.get("num_hidden_layers") or 0
    return PlmModel(backbone, placed(memory, layers), seed)


def _fresh_backbone(plm: PlmConfig, pad_id: int) -> Backbone:
    if plm.backbone == "distilbert":
        return {
            "model_type": "distilbert", "dim": plm.width, "n_layers": plm.layers, "n_heads": plm.heads,
            "hidden_dim": plm.ffn_width, "max_position_embeddings": plm.max_positions, "dropout": plm.dropout,
            "attention_dropout": plm.attention_dropout, "pad_token_id": pad_id, "initializer_range": plm.init_std,
        }  # fmt: skip
    backbone = {
        "model_type": plm.backbone, "hidden_size": plm.width, "num_hidden_layers": plm.layers,
        "num_attention_heads": plm.heads, "intermediate_size": plm.ffn_width,
        "max_position_embeddings": plm.max_positions, "hidden_dropout_prob": plm.dropout,
        "attention_probs_dropout_prob": plm.attention_dropout, "pad_token_id": pad_id,
        "initializer_range": plm.init_std,
    }  # fmt: skip
    if plm.backbone == "roberta":
        # Its positions are counted from pad_token_id + 1.
        return backbone | {
            "max_position_embeddings": plm.max_positions + pad_id + 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5
        }  # fmt: skip
    return backbone


def _read_backbone(checkpoint: str) -> Backbone:
    try:
        # A memory is looked for where the weights are (distlm.models.plm.init).
        ours, library = plain_config(Path(checkpoint)), transformers_library()
        config = library.AutoConfig.for_model(**ours) if ours else library.AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise DistlmError(
            f"plm.checkpoint={checkpoint}: no model folder or name on the hub that transformers can read ({error})"
        ) from error
    found: Backbone = config.to_dict()
    if found["model_type"] not in ("bert", "distilbert", "roberta"):
        raise DistlmError(
            f"plm.checkpoint={checkpoint}: a {found['model_type']}; bert, distilbert and roberta are known"
        )
    found.pop("vocab_size", None)
    return found


def _masked_lm(backbone: Backbone, vocabulary: int) -> Any:
    config = backbone_config(backbone, vocabulary)
    return transformers_library().AutoModelForMaskedLM.from_config(config, attn_implementation=NAME)


def backbone_config(backbone: Backbone, vocabulary: int) -> Any:
    """Hugging Face's configuration object, for models with the attention NAME."""
    library = transformers_library()
    register()
    # Weights are fp32 here, whatever precision a checkpoint was saved in.
    dropped = ("model_type", "vocab_size", "dtype", "torch_dtype")
    rest = {key: value for key, value in backbone.items() if key not in dropped}
    if "num_labels" in rest:
        # A fine-tuned checkpoint's names of labels would decide about their number.
        rest = {key: value for key, value in rest.items() if key not in ("id2label", "label2id")}
    return library.AutoConfig.for_model(backbone["model_type"], vocab_size=vocabulary, **rest)


def with_dropout(backbone: Backbone, p: float) -> Backbone:
    """Hugging Face's configuration with the dropout p everywhere: embeddings, sublayers, attention weights, heads."""
    return {**backbone, **dict.fromkeys(_DROPOUTS[backbone["model_type"]], p)}


def masked_lm_from(checkpoint: str) -> Any:
    """Hugging Face's model with its weights; a head that the checkpoint lacks is fresh.

    Raises DistlmError for what cannot be read, a missing weight of the encoder, and any of another shape.
    """
    transformers = transformers_library()
    try:
        model, facts = transformers.AutoModelForMaskedLM.from_pretrained(
            checkpoint, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except safetensors.SafetensorError as error:
        raise DistlmError(
            f"plm.checkpoint={checkpoint}: model.safetensors is cut or damaged ({error}); get the checkpoint again"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise DistlmError(
            f"plm.checkpoint={checkpoint}: no model folder or name on the hub that transformers can read ({error})"
        ) from error
    # transformers fills what is missing with random numbers.
    faults = {name: "of another shape" for name, *_ in facts["mismatched_keys"]} | {
        name: "missing"
        for name in facts["missing_keys"]
        if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name
    }
    if faults:
        name = min(faults)
        raise DistlmError(
            f"plm.checkpoint={checkpoint}: {name} is {faults[name]} there (one of {len(faults)} such weights); the "
            "checkpoint is not whole, get it again"
        )
    return model


def transformers_library() -> Any:
    """The library. Raises DistlmError when it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise DistlmError(f"model.kind=plm needs transformers: {install('plm')} ({error})") from error
    return transformers


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
