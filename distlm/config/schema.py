"""The settings that every kind of model has, with types, defaults and help (the string under a field is its help).

Settings of one kind lie with it (distlm/models/KIND/config.py), those of how updates are made in training.py.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from distlm.config.fields import QUESTION, VOLATILE, once, question, volatile
from distlm.errors import UsageError

_S = TypeVar("_S")
SPLITS = ("train", "valid", "test")
"""Splits of a text."""
AUTO = "auto"
"""index.factory: chosen from rows, width and limits."""
ID_BYTES = 8
"""Of a key in an index."""


@dataclass
class DataConfig:
    """Text to token files."""

    source: Literal["folder", "demo", "hub"] = "folder"
    """Where the text comes from: a folder, the small demo corpus, or the Hugging Face hub."""
    text_dir: str = ""
    """Folder that holds, for each split, SPLIT.txt, SPLIT.jsonl or SPLIT.csv (also .gz, .xz, .bz2, .zst),
    SPLIT.parquet, wiki.SPLIT.tokens, or a folder SPLIT of such files (source=folder)."""
    text_field: str = "text"
    """Field of .jsonl, column of .csv and .parquet files that holds the text."""
    hub_name: str = ""
    """Data set on the hub, or a local folder that `datasets` can load (source=hub), e.g. Salesforce/wikitext."""
    hub_config: str = ""
    """Configuration of the hub data set, e.g. wikitext-103-v1."""
    hub_field: str = "text"
    """Column of the hub data set that holds the lines."""
    valid_share: float = 0.0
    """Share of train's documents that are taken out of train to be the valid split (0: the split is there)."""
    test_share: float = 0.0
    """The same for the test split."""
    first_words: int = 0
    """Keep of each split whole lines from its beginning, of at most so many words, line ends counted (0: all)."""
    documents: Literal["blank_line", "title", "line", "whole"] = "blank_line"
    """Where a document ends, for these shares: at a blank line; before a WikiText title (" = Title = " between blank
    lines); at each line; at the end of a file or of a row of a hub data set. A row of .jsonl, .csv and .parquet is a
    document, unless this is line or title."""
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
    """The language model."""

    kind: str = "transformer_lm"
    """transformer_lm: the Baevski–Auli transformer; awd_lstm: the AWD-LSTM of Merity et al.; hf: a causal language
    model of Hugging Face; plm: a masked language model with or without product-key memory; or one of another package
    (entry point group distlm.kinds)."""


@dataclass
class TrainConfig:
    """Training with DeepSpeed."""

    seed: int = 1
    """Seed of initialisation, block order and dropout."""
    init_from: str = ""
    """Run directory or checkpoint of the same kind of model to start from, with its memory: weights alone, everything
    else begins anew; of a run directory the best checkpoint."""
    lr: float = 1.0
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay."""
    clip_norm: float = 0.1
    """Clip the global gradient norm to this (0: never)."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Compute precision; V100 has no bf16."""
    kernels: Literal["auto", "torch", "triton"] = volatile("auto")  # type: ignore[assignment]
    """How memories and softmaxes compute on CUDA devices. torch: by its operations; triton: by kernels, wherever they
    give what torch gives; auto: by what was quicker in a comparison at the first start, which checkpoints record."""
    deepspeed: str = volatile("zero1")  # type: ignore[assignment]
    """DeepSpeed configuration: a name in ds_configs/ (zero0 … zero3, zero1-offload … zero3-offload) or a path of a JSON
    file."""
    valid_every: int = 1400
    """Updates between validations (0: only at the end)."""
    save_every: int = volatile(1400)  # type: ignore[assignment]
    """Updates between checkpoints (0: only at the end and at a stop)."""
    keep_last: int = volatile(2)  # type: ignore[assignment]
    """Newest checkpoints kept; the best one that each of them knows of is kept, too."""
    log_every: int = volatile(20)  # type: ignore[assignment]
    """Updates between progress lines."""
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list, metadata=VOLATILE)
    """Where every stage's metrics are shown besides metrics.jsonl: tensorboard, wandb, or both."""
    max_updates_this_run: int = once(0)  # type: ignore[assignment]
    """Stop after a checkpoint (exit 75) when this many updates were done by this start (0: no limit)."""


@dataclass
class DatastoreConfig:
    """Keys and values of the training tokens."""

    folder: str = volatile("")  # type: ignore[assignment]
    """Where the datastore lies; empty: RUN_DIR/datastore. Several runs may read one."""
    checkpoint: str = ""
    """Checkpoint directory of the model, or a run directory: the best one there, and then `distlm run` trains nothing;
    empty: the best one of this run."""
    tap: str = "last_ffn_input"
    """Hidden state that becomes the key. Of an AWD-LSTM last_output, which is its only one."""
    split: str = "train"
    """Split whose tokens are stored."""
    context_window: int = 1536
    """Tokens before the first stored one: rows = tokens − context_window (min-context rule). −1: chosen for the model,
    an eighth of a forward pass, so that 8 tokens are computed for 7 stored ones; with 1536 and 1536 it is 2 for 1."""
    block: int = 1536
    """Scored tokens of a forward pass. 0: what the context leaves of the tokens that the model takes, at most 2,048."""
    batch_blocks: int = 2
    """Blocks in one forward pass, which is the least that a rank computes."""
    rows_per_shard: int = 1000000
    """Rows in one shard (one file of keys); rounded down to whole batches of blocks. Ranks share a shard's batches."""
    key_dtype: Literal["float16", "float32"] = "float16"
    """Type of the keys on disk."""

    @property
    def key_item(self) -> int:
        """Bytes of one number of a key."""
        return 2 if self.key_dtype == "float16" else 4


@dataclass
class IndexConfig:
    """The faiss index."""

    name: str = question("")  # type: ignore[assignment]
    """Name of its folder RUN_DIR/index/NAME; empty: made from the factory. A run may have any number of indexes."""
    folder: str = question("")  # type: ignore[assignment]
    """Where the index lies; empty: RUN_DIR/index/NAME. Several runs may read one."""
    factory: str = question("auto")  # type: ignore[assignment]
    """faiss factory string; the list count is scaled down, with a message, when rows are few. auto: chosen from the
    store's rows and width and the two limits below; `index train` says what and why, and keeps it in choice.json."""
    max_bytes_per_key: int = question(0)  # type: ignore[assignment]
    """factory=auto: most bytes of a key in the index, 8 of id included (0: 72, as of PQ64)."""
    max_memory: float = question(0.0)  # type: ignore[assignment]
    """factory=auto: most GB of the whole index (0: no limit)."""
    sample: int = question(1048576)  # type: ignore[assignment]
    """Keys the template is trained on (fewer when the store is smaller)."""
    seed: int = question(1)  # type: ignore[assignment]
    """Seed of the sample and of k-means."""
    merge: bool = volatile(True)  # type: ignore[assignment]
    """Merge the parts into one file; false: they are searched where they lie, with the same results."""
    keep_parts: bool = volatile(True)  # type: ignore[assignment]
    """Keep the parts after they were merged; false frees their disk. `index search` on several ranks reads parts."""


@dataclass
class KnnConfig:
    """Search, scoring and evaluation."""

    folder: str = question("")  # type: ignore[assignment]
    """Where the neighbours of each split lie; empty: RUN_DIR/neighbours/LABEL. Several runs may read them."""
    # Volatile: neighbours on disk stay true when these change, and tuning anew on them is what they are kept for.
    splits: list[str] = field(default_factory=lambda: ["valid", "test"], metadata=VOLATILE)
    """Splits that are searched: the first is for tuning, the others are evaluated with frozen settings."""
    context_window: int = 2560
    """Previous tokens given to each evaluation block."""
    carry: bool = False
    """Read each split in one go: the hidden state of a recurrent model (awd_lstm) is carried from block to block, as
    its own evaluation does; with context_window=0."""
    block: int = 512
    """Longest evaluation block; whole lines are packed greedily."""
    batch_blocks: int = 2
    """Evaluation blocks in one forward pass; 1 where there are few and they have 1,024 tokens, context included."""
    blocks_per_unit: int = 16
    """Most evaluation blocks in one unit of work (one file of neighbours): one pass where there are few."""
    k: int = question(1024)  # type: ignore[assignment]
    """Neighbours per query."""
    nprobe: int = question(32)  # type: ignore[assignment]
    """Lists searched per query."""
    candidates: int = question(0)  # type: ignore[assignment]
    """Neighbours that the index is asked for, of which exact distances choose k; fewer than k (1): k. 0: 2k where codes
    are coarse (fewer than 4 bits for each number of a key), else k."""
    distances: Literal["exact", "quantised"] = field(default="exact", metadata=QUESTION)
    """exact: squared L2 recomputed from the true keys; quantised: as the index gives them."""
    search: Literal["index", "brute"] = field(default="index", metadata=QUESTION)
    """index: the faiss index; brute: every key, exactly (small stores)."""
    scan: Literal["queries", "lists", "gpu"] = field(default="queries", metadata=VOLATILE)
    """queries: each query reads its lists, 4-bit codes from memory and by tables of 8 bits, which finds slightly other
    neighbours; lists: each list is read once for thousands of queries, by one of the ranks, for an index that is larger
    than memory; gpu: faiss-gpu on each rank's GPU, checked on some queries."""
    similarity: Literal["l2", "dot"] = field(default="l2", metadata=QUESTION)
    """How near a found neighbour is: squared L2, or dot product with the query. They are found by L2 either way. By dot
    product each k is a search of its own, and there is no λ by distance."""
    self_test: bool = field(default=True, metadata=VOLATILE)
    """Stop when stored keys do not find themselves, or kept neighbours are not the store's; false: the results say so
    (`--no-self-test`)."""
    lambdas: list[float] = field(default_factory=lambda: [round(0.05 * i, 2) for i in range(0, 20)], metadata=VOLATILE)
    """Interpolation weights tried on the first split."""
    temperatures: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], metadata=VOLATILE
    )
    """Temperatures tried on the first split."""
    ks: list[int] = field(default_factory=list, metadata=VOLATILE)
    """Numbers of neighbours tried on the first split, those above k left out; none: k
    alone."""
    ladder_sample: int = field(default=256, metadata=VOLATILE)
    """Tokens of the last split on which brute force, rescored and quantised distances are compared (0: none); the
    brute force reads the whole store once."""
    extra_runs: list[str] = field(default_factory=list, metadata=VOLATILE)
    """Run directories with other datastores, in which the same tokens were searched with the same model: mixed in, each
    with a λ of its own."""
    buckets: int = field(default=64, metadata=VOLATILE)
    """Buckets of the distance to the nearest neighbour; each has its own λ, fitted on the first split (0: none)."""
    gate: bool = field(default=True, metadata=VOLATILE)
    """Fit a gate on the first split: it predicts λ before the search, and shows what skipping searches costs."""

    @property
    def tried_ks(self) -> list[int]:
        """Numbers of neighbours that tuning tries."""
        return [k for k in self.ks if k <= self.k] or [self.k]


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
    """Ranks of each parallel stage of `distlm run`, and of `distlm submit` on this machine. On Slurm, and under a
    launcher that you call yourself, the start says how many there are."""
    launcher: Literal["mpirun", "torchrun", "deepspeed"] = volatile("mpirun")  # type: ignore[assignment]
    """Launcher of the training stage; the datastore and index stages always use mpirun."""
    threads: int = volatile(0)  # type: ignore[assignment]
    """CPU threads per rank (0: the cores Slurm gives it, or that it may run on, shared where ranks are not bound)."""
    lost_after_s: int = volatile(60)  # type: ignore[assignment]
    """Seconds without a sign of life after which a rank counts as dead and the others end (0: never)."""
    verify: bool = once(True)  # type: ignore[assignment]
    """Compare files with their checksums before a stage reads them. A file is read once for this, and again when it has
    changed."""
    stage_in: str = volatile("")  # type: ignore[assignment]
    """Folder on each node's own disk, e.g. /local/scratch or $TMPDIR (read on each node): what `knn search` reads at
    random (index, values, keys that are read more than once) and `index add` reads (keys) is copied there once a node,
    checked on the way and removed at the end. Empty: DISTLM_STAGE_IN, and where that is empty nothing is copied."""
    share: str = once("")  # type: ignore[assignment]
    """K/N: this process is number K of N independent ones without MPI (`datastore write`, `index add`) and does units
    K, K+N, …; the same command without it then completes the stage."""


@dataclass
class RunConfig:
    """A whole run. Each kind of model has its own, with the sections that it reads."""

    WITHOUT: ClassVar[frozenset[str]] = frozenset()
    """Sections of this class that a kind of model does not read: they are no part of its runs."""

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
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Neural cache."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Ranks and launcher of `distlm run`."""

    def section(self, cls: type[_S]) -> _S:
        """The section of this class, where the kind of model has one. Raises UsageError where it has none."""
        for item in sections_of(type(self)).values():
            value: Any = getattr(self, item.name)
            if isinstance(value, cls):
                return value
        raise UsageError(f"model.kind={self.model.kind} has no settings of this sort ({cls.__name__})")


def sections_of(cls: type[RunConfig]) -> dict[str, dataclasses.Field[Any]]:
    """Name → field of the sections that are part of such runs."""
    return {
        item.name: item
        for item in dataclasses.fields(cls)
        if dataclasses.is_dataclass(item.type) and item.name not in cls.WITHOUT
    }
