"""The transformer as a model of Hugging Face; `distlm export hf` copies this module, and what it uses."""

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedConfig

from distlm.memory.inference import MemoryReader, make_readers
from distlm.models.export.causal import CausalWords
from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import DecoderLayer, TransformerLM


class DistlmTransformerConfig(PreTrainedConfig):
    """The transformer language model of Baevski & Auli (2019)."""

    model_type = "distlm_transformer_lm"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn_width",
        "max_position_embeddings": "max_positions",
    }

    vocab_size: int = 8
    """Words V, specials included."""
    layers: int = 16
    width: int = 1024
    heads: int = 8
    ffn_width: int = 4096
    cutoffs: list[int] | tuple[int, ...] = ()
    """Band edges of adaptive input and softmax."""
    factor: int = 4
    """Each further band's embedding is this many times narrower."""
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    softmax_dropout: float = 0.0
    max_positions: int = 3072
    """Longest sequence, in tokens."""
    tie_word_embeddings: bool = True
    memory: dict[str, Any] | None = None
    """What make_readers and DecoderLayer.add_memory take; None: no memory."""


def no_rows(config: Any) -> None:
    """Rows matter in training alone."""


def equip_readers(
    layers: Sequence[DecoderLayer], config: Any, rows: object, exchange: object
) -> dict[int, MemoryReader]:
    """Give the layers that config.memory names their memories."""
    made = make_readers(config.memory)
    for position, memory in made.items():
        layers[position - 1].add_memory(memory, config.memory, tuple)
    return made


class DistlmTransformerForCausalLM(CausalWords):
    """The transformer with adaptive input and tied adaptive softmax over words."""

    config_class = DistlmTransformerConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = TransformerLM(cast(TransformerConfig, config), config.vocab_size)
        ours, softmax = (dict(part.named_parameters()) for part in (self.model.embedding, self.model.softmax))
        # What adaptive input and softmax share is saved once.
        self._tied_weights_keys = {
            f"model.softmax.{name}": f"model.embedding.{name}" for name in ours if name in softmax
        }
        self.post_init()
