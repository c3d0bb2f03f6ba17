"""The AWD-LSTM as a model of Hugging Face; `distlm export hf` copies this module, and what it uses."""

from typing import Any, cast

from transformers import PreTrainedConfig

from distlm.models.awd_lstm.config import LstmConfig
from distlm.models.awd_lstm.model import AwdLstm
from distlm.models.export.causal import CausalWords


class DistlmAwdLstmConfig(PreTrainedConfig):
    """The AWD-LSTM (Merity et al. 2017)."""

    model_type = "distlm_awd_lstm"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "max_position_embeddings": "max_positions",
    }

    vocab_size: int = 8
    """Words V, specials included; the embedding has no rows of <s> and <pad>."""
    layers: int = 3
    width: int = 400
    """Width D of the embedding and of the last layer."""
    hidden_width: int = 1150
    """Width of the layers below the last one."""
    embedding_dropout: float = 0.0
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    weight_dropout: float = 0.0
    max_positions: int = 65536


class DistlmAwdLstmForCausalLM(CausalWords):
    """The AWD-LSTM over words; each text is read from the zero state."""

    config_class = DistlmAwdLstmConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = AwdLstm(cast(LstmConfig, config), config.vocab_size)
        self.post_init()
