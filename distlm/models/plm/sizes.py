"""The sizes of a masked language model's backbone, whatever its architecture calls them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distlm.models.plm.model import backbone_config


@dataclass(frozen=True)
class BackboneSizes:
    """Of BERT, DistilBERT or RoBERTa."""

    layers: int
    width: int
    """Model width D."""
    heads: int
    ffn_width: int
    positions: int
    """Tokens of the longest row."""
    attention_dropout: float


def backbone_sizes(backbone: Mapping[str, Any]) -> BackboneSizes:
    """Sizes of a backbone from its Hugging Face configuration, as model.json has it; no weights are made or read."""
    # The vocabulary is no part of these sizes.
    hf = backbone_config(dict(backbone), 1)
    small = hf.model_type == "distilbert"
    positions = hf.max_position_embeddings
    if hf.model_type == "roberta":
        # Its positions are counted from pad_token_id + 1.
        positions -= hf.pad_token_id + 1
    return BackboneSizes(
        hf.num_hidden_layers, hf.hidden_size, hf.num_attention_heads,
        hf.hidden_dim if small else hf.intermediate_size, positions,
        hf.attention_dropout if small else hf.attention_probs_dropout_prob,
    )  # fmt: skip
