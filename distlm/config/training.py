"""Settings of training by numbered updates of equal size, for the kinds of model that are trained so."""

from dataclasses import dataclass, field
from typing import Literal

from distlm.config.fields import LENGTH
from distlm.config.schema import TrainConfig


@dataclass
class UpdatesConfig(TrainConfig):
    """Training with DeepSpeed by a fixed number of updates."""

    blocks_per_update: int = 24
    """The global batch size: blocks (rows of a masked model) in one update, over all ranks and accumulation steps."""
    micro_blocks: int = 1
    """Blocks in one forward pass, the micro-batch. blocks_per_update / micro_blocks must divide over the ranks."""
    updates: int = field(default=286000, metadata=LENGTH)
    """Optimizer updates in all. It may grow in a finished run, with a schedule that does not end."""
    optimizer: Literal["nag", "adam"] = "nag"
    """nag: Nesterov's accelerated gradient as fairseq computes it; adam: Adam."""
    momentum: float = 0.99
    """Momentum of nag."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Betas of adam."""
    adam_eps: float = 1e-8
    """Epsilon of adam."""
    schedule: Literal["cosine", "inverse_sqrt", "linear", "constant"] = "cosine"
    """Learning-rate schedule after warm-up."""
    min_lr: float = 1e-4
    """Floor of the cosine."""
    warmup_updates: int = 16000
    """Updates of linear warm-up."""
    warmup_init_lr: float = 1e-7
    """Learning rate at update 0."""
    cosine_period: int = 270000
    """Updates of the first cosine cycle."""
    cosine_t_mult: float = 2.0
    """Each cycle is this many times longer than the one before."""
    cosine_shrink: float = 0.75
    """Peak and floor shrink by this at each restart."""


@dataclass
class BlocksConfig(UpdatesConfig):
    """Training with DeepSpeed by a fixed number of updates, each of blocks of consecutive tokens."""

    tokens_per_sample: int = 3072
    """Length of a training block, in tokens."""
    l2_weight: float = 0.0
    """ω of Ton et al.: weight of the penalty on the hidden state r (train.tap) of every token; 0 is plain training."""
    l2_reduction: Literal["mean", "sum"] = "mean"
    """‖·‖² of one token: mean or sum over the width. The paper does not say; a sum swamps the loss at ω = 1."""
    tap: str = "last_ffn_input"
    """Which hidden state r is: the one that becomes the key."""
