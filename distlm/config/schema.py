"""Every setting of a run, with its type, default and help text (the string under a field is its help)."""

from dataclasses import dataclass, field
from typing import Literal

from distlm.config.fields import VOLATILE, volatile
from distlm.config.plm import FinetuneConfig, MemoryConfig, PlmConfig, ShardsConfig


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
    dictionary: str = ""
    """A dict.txt to use as it is (fairseq's format) instead of counting words: that of a model trained elsewhere."""
    tokenizer: str = ""
    """Folder (with a tokenizer.json) or name on the hub of a Hugging Face tokenizer: tokens are its sub-words; empty:
    words. Perplexity stays per word."""
    line_end: str = ""
    """Piece of the tokenizer that ends a line; empty: its newline, or its end of a text where it has none."""


@dataclass
class ModelConfig:
    """The Baevski–Auli transformer LM with adaptive input and tied adaptive softmax; the defaults are fairseq's
    transformer_lm_wiki103. With kind=awd_lstm the section `lstm` describes the model instead."""

    kind: Literal["transformer_lm", "awd_lstm", "hf", "plm"] = "transformer_lm"
    """The Baevski–Auli transformer, the AWD-LSTM of Merity et al. (sections `lstm` and `awd`), a causal language model
    of Hugging Face (section `hf`), or a masked language model with or without product-key memory (sections `shards`,
    `plm` and `memory`)."""
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
class LstmConfig:
    """The AWD-LSTM (Merity et al. 2017), with model.kind=awd_lstm; the defaults are the authors' for WikiText-2."""

    layers: int = 3
    """LSTM layers."""
    width: int = 400
    """Width D of the embedding and of the last layer, also the key width. The decoder is tied to the embedding."""
    hidden_width: int = 1150
    """Width of the layers below the last one."""
    embedding_dropout: float = 0.1
    """Whole words whose embedding is dropped for one update (dropoute)."""
    input_dropout: float = 0.65
    """Locked dropout on the embedded input (dropouti): one mask per column for all time steps."""
    hidden_dropout: float = 0.2
    """Locked dropout between layers (dropouth)."""
    output_dropout: float = 0.4
    """Locked dropout on the output of the last layer, before the decoder (dropout)."""
    weight_dropout: float = 0.5
    """Dropout on the hidden-to-hidden weights of every layer, one mask per update (wdrop)."""
    max_positions: int = 65536
    """Longest sequence that datastore and evaluation may give in one pass, in tokens; it bounds memory only."""


@dataclass
class HfConfig:
    """Any causal language model of Hugging Face, with model.kind=hf; its tokenizer is data.tokenizer. Of the section
    `model` it reads kind alone. Hidden states are named by the module's path: transformer.h.11.mlp:input."""

    name: str = ""
    """Folder or name on the hub of the model whose weights training, or `distlm import hf`, starts from."""


@dataclass
class AwdConfig:
    """Training of the AWD-LSTM: streams of text, AR and TAR, NT-ASGD, fine-tuning. Of the section `train` it reads
    seed, lr, weight_decay, clip_norm, precision, deepspeed, valid_every (only whether it is 0), save_every, keep_last,
    log_every and max_updates_this_run."""

    batch: int = 80
    """Columns the corpus is cut into, over all ranks: the batch size."""
    micro_batch: int = 0
    """Columns in one forward pass (0: all columns of a rank)."""
    bptt: int = 70
    """Base length of a chunk, in tokens, to which train.lr belongs."""
    variable_length: bool = True
    """Draw chunk lengths around bptt and scale the rate with them (section 5 of the paper); false: always bptt."""
    ar: float = 2.0
    """α: weight of the mean square of the dropped output of the last layer."""
    tar: float = 1.0
    """β: weight of the mean square of the change of the last layer's output from step to step."""
    epochs: int = 750
    """Epochs of SGD and NT-ASGD."""
    finetune_epochs: int = 750
    """At most so many epochs of fine-tuning, which averages anew from the best weights until the trigger fires."""
    trigger: Literal["masked", "window"] = "masked"
    """masked: the validation loss exceeds the least of all but the last `nonmono` validations (the authors' code);
    window: the least of the last `nonmono` (the text of the arXiv paper)."""
    log_interval: int = 0
    """L of Algorithm 1: updates of an epoch between two validations, at which the trigger looks; the end of the epoch
    is one, too (0: that alone, as in the authors' code)."""
    nonmono: int = 5
    """n of the trigger, in validations."""
    on_trigger: Literal["average", "halve", "nothing"] = "average"
    """average: NT-ASGD; halve: SGD that halves its rate each time (Table 4); nothing: plain SGD."""
    reference_eta_lag: bool = False
    """While averaging, step with the rate of the chunk before, as the authors' code does; false: each chunk's own."""
    valid_batch: int = 10
    """Columns of the validation during training. `distlm evaluate` reads the split as one stream."""


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
    optimizer: Literal["nag", "adam", "nt_asgd"] = "nag"
    """Nesterov accelerated gradient with lr_old (fairseq), Adam, or SGD that turns into averaged SGD (awd_lstm)."""
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
    schedule: Literal["cosine", "inverse_sqrt", "linear", "constant"] = "cosine"
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
    """ω of Ton et al.: weight of the penalty on the tapped state r of every token; 0 is plain training."""
    l2_reduction: Literal["mean", "sum"] = "mean"
    """‖·‖² of one token: mean or sum over the width. The paper does not say; a sum swamps the loss at ω = 1."""
    regulariser: Literal["l2", "queue", "mean"] = "l2"
    """Penalty of a token: l2: ‖r‖² (eq. 2); queue: Σ_i ‖Q_i − r‖² over the queue of its target word, the word's last
    states as a momentum encoder saw them (eq. 1); mean: the same with running means in place of queues."""
    queue_length: int = 16
    """L of eq. 1: states in a word's queue. The sum over them is literal, so that the pull grows with L."""
    queue_fill: int = 1
    """A word's queue counts once it holds so many states."""
    encoder_momentum: float = 0.999
    """m of the momentum encoder: θ' ← m θ' + (1 − m) θ after every update."""
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
    merge: bool = volatile(True)  # type: ignore[assignment]
    """Merge the parts into one file; false: they are searched where they lie, with the same results."""
    keep_parts: bool = volatile(True)  # type: ignore[assignment]
    """Keep the parts after they were merged; false frees their disk."""


@dataclass
class KnnConfig:
    """Search, scoring and evaluation."""

    # Volatile: neighbours on disk stay true when these change, and tuning anew on them is what they are kept for.
    splits: list[str] = field(default_factory=lambda: ["valid", "test"], metadata=VOLATILE)
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
    scan: Literal["queries", "lists", "gpu"] = field(default="queries", metadata=VOLATILE)
    """queries: each query reads its lists, 4-bit codes from memory; lists: each list is read once for thousands of
    queries, for an index that is larger than memory; gpu: faiss-gpu on each rank's GPU, checked on some queries."""
    similarity: Literal["l2", "dot"] = "l2"
    """How near a found neighbour is: squared L2, or dot product with the query. They are found by L2 either way."""
    self_test: bool = field(default=True, metadata=VOLATILE)
    """Stop when stored keys do not find themselves, or kept neighbours are not the store's; false: the results say so
    (`--no-self-test`)."""
    lambdas: list[float] = field(default_factory=lambda: [round(0.05 * i, 2) for i in range(0, 20)], metadata=VOLATILE)
    """Interpolation weights tried on the first split."""
    temperatures: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], metadata=VOLATILE
    )
    """Temperatures tried on the first split."""
    ks: list[int] = field(default_factory=lambda: [1024], metadata=VOLATILE)
    """Numbers of neighbours tried on the first split; each at most k."""
    ladder_sample: int = field(default=256, metadata=VOLATILE)
    """Tokens of the last split on which brute force, rescored and quantised distances are compared (0: none); the
    brute force reads the whole store once."""
    extra_runs: list[str] = field(default_factory=list, metadata=VOLATILE)
    """Run directories with other datastores, in which the same tokens were searched with the same model: mixed in, each
    with a λ of its own."""
    buckets: int = field(default=64, metadata=VOLATILE)
    """Buckets of the nearest distance, each with a λ of its own fitted on the first split (0: none)."""
    gate: bool = field(default=True, metadata=VOLATILE)
    """Fit a gate on the first split: λ from what is known before the search, and what skipping searches costs."""


@dataclass
class CacheConfig:
    """The neural cache: a softmax over the hidden states of the last tokens of the evaluated text itself."""

    # Volatile: RUN_DIR/cache names the settings its files were made with and refuses others.
    use: bool = field(default=False, metadata=VOLATILE)
    """`distlm run` computes the cache too; `distlm knn cache` does so in any case."""
    tap: str = field(default="", metadata=VOLATILE)
    """Hidden state h; empty: datastore.tap, whose states `knn search` has already kept."""
    fill: Literal["full", "partial"] = field(default="full", metadata=VOLATILE)
    """full: no cache until more than `window` tokens are seen (Merity et al.'s code); partial: as soon as there are
    any."""
    windows: list[int] = field(default_factory=lambda: [500, 1000, 2000, 3785], metadata=VOLATILE)
    """Window sizes tried on the first split, in tokens, rising (Merity et al.: 2000 for PTB, 3785 for WikiText-2)."""
    thetas: list[float] = field(
        default_factory=lambda: [0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.662, 0.8, 1.0, 1.5], metadata=VOLATILE
    )
    """Flattening θ tried on the first split: the smaller, the flatter (Merity et al.: 1.0 and 0.662). It goes with
    1 / |h|²."""
    lambdas: list[float] = field(default_factory=lambda: [round(0.02 * i, 2) for i in range(0, 26)], metadata=VOLATILE)
    """Weights of the cache tried on the first split."""


@dataclass
class LaunchConfig:
    """How `distlm run` starts its stages."""

    ranks: int = volatile(1)  # type: ignore[assignment]
    """Ranks of each parallel stage."""
    launcher: Literal["mpirun", "torchrun", "deepspeed"] = volatile("mpirun")  # type: ignore[assignment]
    """Launcher of the training stage; the datastore and index stages always use mpirun."""
    threads: int = volatile(0)  # type: ignore[assignment]
    """CPU threads per rank (0: the cores Slurm gives it, or that it may run on, shared where ranks are not bound)."""
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
    lstm: LstmConfig = field(default_factory=LstmConfig)
    """The AWD-LSTM."""
    awd: AwdConfig = field(default_factory=AwdConfig)
    """Training of the AWD-LSTM."""
    hf: HfConfig = field(default_factory=HfConfig)
    """A causal language model of Hugging Face."""
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    """Shards of token rows for pretraining."""
    plm: PlmConfig = field(default_factory=PlmConfig)
    """The masked language model."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Its product-key memory."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Fine-tuning."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training."""
    datastore: DatastoreConfig = field(default_factory=DatastoreConfig)
    """Datastore."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """Index."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """Search, scoring, evaluation."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Neural cache."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Ranks and launcher of `distlm run`."""
