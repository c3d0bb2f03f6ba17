"""Every setting of a run, with its type, default and help text (the string under a field is its help)."""

from dataclasses import dataclass, field
from typing import Literal

_VOLATILE = {"volatile": True}


def volatile(default: object) -> object:
    """A field that may differ between two runs of the same run directory: it changes speed, not results."""
    return field(default=default, metadata=_VOLATILE)


@dataclass
class DataConfig:
    """Text to token files."""

    source: Literal["folder", "demo", "hub"] = "folder"
    """Where the text comes from: a folder, the small demo corpus, or the Hugging Face hub."""
    text_dir: str = ""
    """Folder with {train,valid,test}.txt or wiki.{train,valid,test}.tokens (source=folder)."""
    hub_name: str = ""
    """Data set on the hub, or a local folder that `datasets` can load (source=hub), e.g. Salesforce/wikitext."""
    hub_config: str = ""
    """Configuration of the hub data set, e.g. wikitext-103-v1."""
    hub_field: str = "text"
    """Column of the hub data set that holds the lines."""
    tokens_dir: str = ""
    """Where token files live; empty: RUN_DIR/tokens. Several runs may share one."""
    min_count: int = 1
    """Words seen fewer times in train than this become <unk>."""
    max_words: int = 0
    """Keep only the most frequent words (0: all); the rest become <unk>."""
    pad_to_multiple: int = 8
    """The dictionary is padded with unused words to a multiple of this (fairseq pads to 8)."""


@dataclass
class ModelConfig:
    """The Baevski–Auli transformer LM with adaptive input and tied adaptive softmax; the defaults are fairseq's
    transformer_lm_wiki103."""

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
class TrainConfig:
    """Training with DeepSpeed."""

    seed: int = 1
    """Seed of initialisation, block order and dropout."""
    tokens_per_sample: int = 3072
    """Length of a training block, in tokens."""
    blocks_per_update: int = 24
    """Blocks in one optimizer update, over all ranks and accumulation steps."""
    micro_blocks: int = 1
    """Blocks in one forward pass. blocks_per_update / micro_blocks must divide over the ranks."""
    updates: int = 286000
    """Optimizer updates in all."""
    optimizer: Literal["nag", "adam"] = "nag"
    """Nesterov accelerated gradient with lr_old (fairseq), or Adam."""
    momentum: float = 0.99
    """Momentum of nag."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Betas of adam."""
    adam_eps: float = 1e-8
    """Epsilon of adam."""
    weight_decay: float = 0.0
    """Weight decay."""
    clip_norm: float = 0.1
    """Clip the global gradient norm to this (0: never)."""
    schedule: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"
    """Learning-rate schedule after warm-up."""
    lr: float = 1.0
    """Peak learning rate."""
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
    precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Compute precision; V100 has no bf16."""
    deepspeed: str = volatile("zero1")  # type: ignore[assignment]
    """DeepSpeed configuration: a name in ds_configs/ (zero0 … zero3) or a path of a JSON file."""
    l2_weight: float = 0.0
    """ω of Ton et al. eq. 2: adds ω‖r‖² on the tap point to the loss; 0 is plain training."""
    l2_reduction: Literal["mean", "sum"] = "mean"
    """‖r‖² of one token: mean or sum over the width. The paper does not say; a sum swamps the loss at ω = 1."""
    tap: str = "last_ffn_input"
    """Which hidden state r is: the one that becomes the key."""
    valid_every: int = 1400
    """Updates between validations (0: only at the end)."""
    save_every: int = 1400
    """Updates between checkpoints (0: only at the end and at a stop)."""
    keep_last: int = 2
    """Checkpoints kept besides the best one."""
    log_every: int = volatile(20)  # type: ignore[assignment]
    """Updates between progress lines."""
    max_updates_this_run: int = volatile(0)  # type: ignore[assignment]
    """Stop after a checkpoint (exit 75) when this many updates were done by this start (0: no limit)."""


@dataclass
class DatastoreConfig:
    """Keys and values of the training tokens."""

    checkpoint: str = ""
    """Checkpoint directory of the model; empty: the best one of this run."""
    tap: str = "last_ffn_input"
    """Hidden state that becomes the key."""
    split: str = "train"
    """Split whose tokens are stored."""
    context_window: int = 1536
    """Tokens before the first stored one: rows = tokens − context_window (min-context rule)."""
    block: int = 1536
    """Scored tokens in one forward pass."""
    batch_blocks: int = 2
    """Blocks in one forward pass."""
    rows_per_shard: int = 1000000
    """Rows in one shard; rounded down to whole batches of blocks."""
    key_dtype: Literal["float16", "float32"] = "float16"
    """Type of the keys on disk."""


@dataclass
class IndexConfig:
    """The faiss index."""

    factory: str = "IVF4096,PQ64"
    """faiss factory string; the list count is scaled down, with a message, when rows are few."""
    sample: int = 1048576
    """Keys the template is trained on (fewer when the store is smaller)."""
    seed: int = 1
    """Seed of the sample and of k-means."""
    keep_parts: bool = volatile(True)  # type: ignore[assignment]
    """Keep the parts after they were merged; false frees their disk."""


@dataclass
class KnnConfig:
    """Search, scoring and evaluation."""

    # Volatile: neighbours on disk stay true when these change, and tuning anew on them is what they are kept for.
    splits: list[str] = field(default_factory=lambda: ["valid", "test"], metadata=_VOLATILE)
    """Splits that are searched: the first is for tuning, the others are evaluated with frozen settings."""
    context_window: int = 2560
    """Previous tokens given to each evaluation block."""
    block: int = 512
    """Longest evaluation block; whole lines are packed greedily."""
    batch_blocks: int = 2
    """Evaluation blocks in one forward pass."""
    blocks_per_unit: int = 16
    """Evaluation blocks in one unit of work (one file of neighbours)."""
    k: int = 1024
    """Neighbours per query."""
    nprobe: int = 32
    """Lists searched per query."""
    distances: Literal["exact", "quantised"] = "exact"
    """exact: squared L2 recomputed from the true keys; quantised: as the index gives them."""
    search: Literal["index", "brute"] = "index"
    """index: the faiss index; brute: every key, exactly (small stores)."""
    lambdas: list[float] = field(default_factory=lambda: [round(0.05 * i, 2) for i in range(0, 20)], metadata=_VOLATILE)
    """Interpolation weights tried on the first split."""
    temperatures: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], metadata=_VOLATILE
    )
    """Temperatures tried on the first split."""
    ks: list[int] = field(default_factory=lambda: [1024], metadata=_VOLATILE)
    """Numbers of neighbours tried on the first split; each at most k."""


@dataclass
class LaunchConfig:
    """How `distlm run` starts its stages."""

    ranks: int = volatile(1)  # type: ignore[assignment]
    """Ranks of each parallel stage."""
    launcher: Literal["mpirun", "torchrun", "deepspeed"] = volatile("mpirun")  # type: ignore[assignment]
    """Launcher of the training stage; the datastore and index stages always use mpirun."""
    threads: int = volatile(0)  # type: ignore[assignment]
    """CPU threads per rank (0: cores / local ranks)."""
    lost_after_s: int = volatile(60)  # type: ignore[assignment]
    """Seconds without a sign of life after which a rank counts as dead and the others end (0: never)."""
    share: str = volatile("")  # type: ignore[assignment]
    """K/N: this process is number K of N independent ones without MPI (`datastore write`, `index add`) and does units
    K, K+N, …; the same command without it then completes the stage."""


@dataclass
class RunConfig:
    """A whole run."""

    name: str = "run"
    """Name of the run; also the last part of run_dir when that is empty."""
    run_dir: str = field(default="", metadata={"volatile": True})
    """Run directory; empty: runs/NAME."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text and token files."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training."""
    datastore: DatastoreConfig = field(default_factory=DatastoreConfig)
    """Datastore."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """Index."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """Search, scoring, evaluation."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Ranks and launcher of `distlm run`."""
