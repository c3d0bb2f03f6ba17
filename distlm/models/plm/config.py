"""Settings of the masked language models: backbone, training, fine-tuning."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from distlm.config.fields import VOLATILE, once, volatile
from distlm.config.schema import ModelConfig, RunConfig
from distlm.config.training import UpdatesConfig
from distlm.data.shards.config import ShardsConfig
from distlm.memory.config import MemoryConfig

_TASK: Literal["SST-2"] = "SST-2"
"""What `distlm finetune` does where no task is named."""


@dataclass
class PlmConfig:
    """The masked language model: BERT, DistilBERT or RoBERTa of Hugging Face; the defaults are BERT-base."""

    backbone: Literal["bert", "distilbert", "roberta"] = "bert"
    """Architecture of a fresh model."""
    checkpoint: str = ""
    """Hugging Face folder or name of the model to start from, instead of a fresh one."""
    init_from: str = ""
    """Run directory or checkpoint, of a model without memory, to start from; memory starts fresh (Kim & Jung: Init)."""
    layers: int = 12
    """Transformer layers."""
    width: int = 768
    """Model width D."""
    heads: int = 12
    """Attention heads."""
    ffn_width: int = 3072
    """Inner width of the feed-forward layers."""
    max_positions: int = 512
    """Longest row, in tokens."""
    dropout: float = 0.1
    """Dropout on embeddings and on the output of each sublayer."""
    attention_dropout: float = 0.1
    """Dropout on attention weights."""
    texts: list[str] = field(default_factory=list, metadata=VOLATILE)
    """Further texts that `distlm evaluate` measures: NAME=FOLDER of shards with a test split and this vocabulary."""
    init_std: float = 0.02
    """Standard deviation of a fresh model's matrices and embeddings; BERT's 0.02 goes with width 768, narrow models
    learn faster from more."""
    short_rows: list[int] = field(default_factory=list)
    """Sequence-length warm-up of a fresh model (neither checkpoint nor init_from): training begins with rows cut into
    pieces of so many tokens, e.g. [16, 64], and then whole rows. In short rows attention learns sooner to pick out
    single tokens."""
    short_updates: list[int] = field(default_factory=list)
    """Updates with pieces of each of those lengths, e.g. [500, 1000]."""
    mask_share: float = 0.15
    """Share of the tokens that are predicted; 80 % of them become [MASK], 10 % a random token, 10 % stay."""


@dataclass
class FinetuneConfig:
    """Fine-tuning on a task of GLUE or on SQuAD 1.1 (`distlm finetune`).

    The defaults are Kim & Jung's (table 3), who leave the batch open. RUN_DIR/finetune/NAME names the settings that its
    results were made with and refuses others.
    """

    task: Literal["", "CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI", "SQuAD"] = field(
        default="", metadata=VOLATILE
    )
    """The task; MNLI is scored on its matched and its mismatched dev set. Empty: finetune.tasks, and SST-2 where there
    are none."""
    tasks: list[Literal["CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI", "SQuAD"]] = field(
        default_factory=list, metadata=VOLATILE
    )
    """Several tasks, one after the other. `distlm run` and the cluster's jobs fine-tune on them after the evaluation;
    without any they do not fine-tune."""
    name: str = field(default="", metadata=VOLATILE)
    """Results go to RUN_DIR/finetune/NAME; empty: the task, with -frozen behind it for memory=frozen."""
    checkpoint: str = field(default="", metadata=VOLATILE)
    """What to start from: a run directory or checkpoint of distlm, a Hugging Face folder, or a name on the hub; empty:
    the newest checkpoint of this run."""
    tokenizer: str = field(default="", metadata=VOLATILE)
    """Folder of the tokenizer, or a vocab.txt; empty: the one that lies in the Hugging Face folder, or the shards'."""
    source: Literal["folder", "hub"] = field(default="folder", metadata=VOLATILE)
    """Where the data are: files, or something that the `datasets` library loads."""
    data_dir: str = field(default="", metadata=VOLATILE)
    """Folder of the GLUE benchmark's files (glue/SST-2/train.tsv, …), or of train-v1.1.json and dev-v1.1.json, which
    may be gzipped (source=folder)."""
    hub_name: str = field(default="", metadata=VOLATILE)
    """Data set on the hub, or a local folder that `datasets` can load (source=hub); empty: nyu-mll/glue or
    rajpurkar/squad."""
    train_rows: int = field(default=0, metadata=VOLATILE)
    """Number of examples to train on, drawn from all of train, the same for every seed (0: all; not for SQuAD)."""
    memory: Literal["updated", "frozen"] = field(default="updated", metadata=VOLATILE)
    """Whether the values of the memory are trained, too (table 5); keys and queries always are."""
    memory_lr: float = field(default=1e-3, metadata=VOLATILE)
    """Learning rate of the values, constant. Their optimizer is that of the pretraining, and starts anew."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5], metadata=VOLATILE)
    """One fine-tuning for each: it decides the head's first weights, the order and the dropout."""
    lr: float = field(default=0.0, metadata=VOLATILE)
    """Peak learning rate of Adam (0: 2e-5 for GLUE, 5e-5 for SQuAD)."""
    epochs: int = field(default=0, metadata=VOLATILE)
    """Passes over the data (0: 10 for GLUE, 3 for SQuAD)."""
    rows_per_update: int = field(default=32, metadata=VOLATILE)
    """Rows in one update, over all ranks."""
    micro_rows: int = field(default=0, metadata=VOLATILE)
    """Rows in one forward pass, over all ranks (0: rows_per_update); the ranks must divide it. A memory's query norm
    pools its statistics over them."""
    length: int = field(default=0, metadata=VOLATILE)
    """Longest row in tokens (0: 128 for GLUE, 384 for SQuAD)."""
    truncation: Literal["longest_first", "only_first", "only_second"] = field(
        default="longest_first", metadata=VOLATILE
    )
    """Which part of a pair is cut at its end where both are too long for a row: the longer one, token by token, of
    equally long ones the second (BERT); or always the first or the second one. Not for SQuAD, whose paragraphs become
    windows."""
    stride: int = field(default=128, metadata=VOLATILE)
    """Tokens from the start of one window of a SQuAD paragraph to the next."""
    answer_tokens: int = field(default=30, metadata=VOLATILE)
    """Longest answer that SQuAD's decoding gives, in tokens."""
    warmup: float = field(default=0.06, metadata=VOLATILE)
    """Share of the updates with a rising learning rate; it then falls to 0, both linearly."""
    dropout: float = field(default=-1.0, metadata=VOLATILE)
    """Dropout of the encoder and before the head; those inside a memory stay (-1: the checkpoint's own)."""
    weight_decay: float = field(default=-1.0, metadata=VOLATILE)
    """Decoupled weight decay, not of biases and norms (-1: 0.1 for GLUE, 0.01 for SQuAD)."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata=VOLATILE)
    """Adam's β₁ and β₂."""
    adam_eps: float = field(default=1e-8, metadata=VOLATILE)
    """Adam's ε."""
    clip_norm: float = field(default=1.0, metadata=VOLATILE)
    """Clip the global gradient norm to this (0: never)."""
    precision: Literal["fp32", "fp16", "bf16"] = field(default="fp32", metadata=VOLATILE)
    """Compute precision; V100 has no bf16."""
    deepspeed: str = volatile("zero1")  # type: ignore[assignment]
    """DeepSpeed configuration: a name in ds_configs/ (zero0 … zero3, zero1-offload … zero3-offload) or a path of a JSON
    file."""
    save_every: int = volatile(0)  # type: ignore[assignment]
    """Updates between checkpoints (0: only at a stop and at the end)."""
    keep_models: bool = volatile(False)  # type: ignore[assignment]
    """Keep the last checkpoint of each seed; false: only the results."""
    max_updates_this_run: int = once(0)  # type: ignore[assignment]
    """Stop after a checkpoint (exit 75) when a seed has had this many updates in this start (0: no limit)."""

    @property
    def folder(self) -> str:
        """Name of the folder of results."""
        return self.name or (self.task or _TASK) + ("-frozen" if self.memory == "frozen" else "")

    def with_defaults(self) -> "FinetuneConfig":
        """A copy in which every setting that was left open has its value of table 3."""
        squad = self.task == "SQuAD"
        return dataclasses.replace(
            self,
            task=self.task or _TASK,
            lr=self.lr or (5e-5 if squad else 2e-5),
            epochs=self.epochs or (3 if squad else 10),
            length=self.length or (384 if squad else 128),
            weight_decay=self.weight_decay if self.weight_decay >= 0 else (0.01 if squad else 0.1),
            micro_rows=self.micro_rows or self.rows_per_update,
            name=self.folder,
        )

    def each(self) -> list["FinetuneConfig"]:
        """The fine-tunings that are asked for, each of one task, with no defaults left."""
        if not self.tasks:
            return [self.with_defaults()]
        return [dataclasses.replace(self, task=task, tasks=[]).with_defaults() for task in self.tasks]


@dataclass
class PlmTraining(UpdatesConfig):
    """Training with DeepSpeed by a fixed number of updates; their blocks are rows of the shards."""


@dataclass
class PlmRun(RunConfig):
    """A run of a masked language model."""

    WITHOUT: ClassVar[frozenset[str]] = frozenset({"data", "datastore", "index", "knn", "cache"})

    model: ModelConfig = field(default_factory=lambda: ModelConfig("plm"))
    """Its kind."""
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    """Shards of token rows for pretraining."""
    plm: PlmConfig = field(default_factory=PlmConfig)
    """The masked language model."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Its product-key memory."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Fine-tuning."""
    train: PlmTraining = field(default_factory=PlmTraining)
    """Training."""
