"""Settings of the Baevski–Auli transformer and its regularised training."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from distlm.config.schema import ModelConfig, RunConfig
from distlm.config.training import BlocksConfig
from distlm.memory.config import MemoryConfig
from distlm.memory.placing import WithMemory
from distlm.models.kind import CausalDescription


@dataclass
class TransformerConfig(ModelConfig, CausalDescription):
    """The Baevski–Auli transformer LM with adaptive input and tied adaptive softmax; the defaults are fairseq's
    transformer_lm_wiki103."""

    KIND: ClassVar[str] = "transformer_lm"

    layers: int = 16
    """Decoder layers."""
    width: int = 1024
    """Model width D, also the key width."""
    heads: int = 8
    """Attention heads (8 in fairseq's code; the papers say 16)."""
    ffn_width: int = 4096
    """Inner width of the feed-forward layers."""
    cutoffs: list[int] = field(default_factory=lambda: [20000, 60000])
    """Band edges of adaptive input and softmax; edges at or above the vocabulary size are dropped."""
    factor: int = 4
    """Each further band's embedding is this many times narrower."""
    dropout: float = 0.3
    """Dropout on embeddings, attention output and FFN output."""
    attention_dropout: float = 0.1
    """Dropout on attention weights."""
    activation_dropout: float = 0.1
    """Dropout after the FFN's ReLU."""
    softmax_dropout: float = 0.2
    """Dropout on the adaptive softmax input and after each tail projection."""
    max_positions: int = 3072
    """Longest sequence, in tokens (context included)."""


@dataclass
class TransformerModel(TransformerConfig, WithMemory):
    """What model.json records of a transformer: the section model, and where there is one the memory."""

    memory: dict[str, Any] = field(default_factory=dict)
    """MemoryConfig, its positions named; empty: no memory."""
    seed: int = 1
    """Of the memory's values, keys and queries."""


@dataclass
class TransformerTraining(BlocksConfig):
    """Training with DeepSpeed in blocks of consecutive tokens, with the regularisers of Ton et al."""

    regulariser: Literal["l2", "queue", "mean"] = "l2"
    """Penalty of a token: l2: ‖r‖² (eq. 2); queue: Σ_i ‖Q_i − r‖² over the queue of its target word, the word's last
    states as a momentum encoder saw them (eq. 1); mean: the same with running means in place of queues."""
    queue_length: int = 16
    """L of eq. 1: states in a word's queue. They are summed and not averaged, so the penalty grows with L."""
    queue_fill: int = 1
    """A word's queue is used once it holds this many states."""
    encoder_momentum: float = 0.999
    """m of the momentum encoder: θ' ← m θ' + (1 − m) θ after every update."""


@dataclass
class TransformerRun(RunConfig):
    """A run of the transformer."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    """The transformer."""
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(positions=[]))
    """Its product-key memory."""
    train: TransformerTraining = field(default_factory=TransformerTraining)
    """Training."""
