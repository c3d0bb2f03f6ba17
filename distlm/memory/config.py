"""Settings of a product-key memory."""

from dataclasses import dataclass, field
from typing import Literal

from distlm.config.fields import volatile


@dataclass
class MemoryConfig:
    """Product-key memory of Lample et al., in place of feed-forward networks or beside them (Kim & Jung); the defaults
    are theirs."""

    kind: Literal["none", "pkm", "resm"] = "none"
    """pkm: in place of a layer's feed-forward network; resm: beside it, added inside its layer norm (of a layer that
    normalises first: behind it)."""
    positions: list[int] = field(default_factory=lambda: [4, 8])
    """Layers that have a memory, counted from 1; empty: the middle one (layer n // 2 + 1 of n), where Lample et al. put
    it."""
    shared: bool = False
    """All layers read the values of one memory, each with keys and queries of its own (Berges et al. 2024)."""
    gated: bool = False
    """Each layer's output is W₂(memory(x) ⊙ SiLU(W₁ x)) instead of memory(x) (Berges et al. 2024)."""
    fresh_ffn: bool = False
    """With init_from of a model without memory: the feed-forward networks of these layers start fresh, too (Kim & Jung:
    ResM')."""
    sub_keys: int = 512
    """n: keys of each half; the memory has K = n² slots."""
    heads: int = 4
    """Heads H; their results are summed."""
    k: int = 32
    """Slots read by each head for each token."""
    key_width: int = 256
    """Width of a head's query; each half key has half of it."""
    query_norm: bool = True
    """Batch norm of the queries, over the tokens (no padding) of the micro-batch on all ranks."""
    norm_momentum: float = 0.1
    """Weight of the newest batch in the running mean and variance."""
    input_dropout: float = 0.0
    """Dropout on the memory's input."""
    query_dropout: float = 0.0
    """Dropout on the queries."""
    value_dropout: float = 0.0
    """Dropout on the memory's output."""
    values: Literal["normal", "zero"] = "normal"
    """Values start as N(0, 1/D), or as zero: then the first loss is that of the model without memory (resm)."""
    alpha: float = 1.0
    """Weight α of the feed-forward network's output (resm)."""
    beta: float = 1.0
    """Weight β of the memory's output."""
    columns: int = volatile(0)  # type: ignore[assignment]
    """Ranks that share the columns of one copy of the values (0: all ranks; 1: every rank has a full copy)."""
    optimizer: Literal["sparse_adam", "adam"] = "sparse_adam"
    """Where ε is added: to √v (torch's SparseAdam), or to the bias-corrected √v̂ (Adam)."""
    row_steps: bool = False
    """Bias correction by the number of a slot's own updates instead of the number of all updates."""
    stale: Literal["lazy", "catch_up"] = "lazy"
    """Slots that an update does not read: left alone, or (when read next) moved as Adam with zero gradients would."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Adam's m and v between updates: fp32, or bf16, rounded at random by a fixed hash: a table with its moments takes
    8 instead of 12 bytes a value. Updates are computed in fp32."""
    lr: float = 1e-3
    """Learning rate of the values, constant."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's β₁ and β₂ for the values."""
    eps: float = 1e-8
    """Adam's ε for the values."""
    clip_norm: float = 0.0
    """Largest 2-norm of the gradient of one memory's values (0: no clipping); apart from train.clip_norm."""
    frozen: bool = False
    """The values stay as they are."""
