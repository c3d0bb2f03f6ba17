"""Fine-tuning a masked language model, with or without memory, on one task with one seed.

As in pretraining the unit of work is a micro-batch over all ranks, each of which takes an equal, contiguous piece; its
rows are padded to its longest, whoever has that. Order of rows and dropout are functions of (seed, update, row).
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from torch import Tensor, nn

from distlm.data.order import rows_for_update
from distlm.data.shards.wordpiece import TOKENIZER
from distlm.finetune.data import Outputs, TaskData
from distlm.finetune.description import TaskModelConfig
from distlm.finetune.model import TaskModel
from distlm.finetune.objective import TaskModule
from distlm.finetune.plan import plan_finetune_rows
from distlm.finetune.records import FinetuneState, TaskMemoryUse
from distlm.finetune.score import TaskScorer, TaskValidation, targets_of
from distlm.finetune.source import Source, start_from_source
from distlm.memory.config import MemoryConfig
from distlm.memory.of_model import restore_memories
from distlm.memory.values.exchange import Exchange
from distlm.models.plm.config import FinetuneConfig, PlmTraining
from distlm.models.plm.model import with_dropout
from distlm.models.row_dropout import row_keys
from distlm.models.tensor_file import read_tensors
from distlm.optim.schedule import learning_rate
from distlm.runtime.metrics import Values
from distlm.runtime.ranks.collective import together
from distlm.runtime.stage import Stage
from distlm.training.checkpoint import Resume
from distlm.training.dsconfig import merge_ds_config
from distlm.training.finished import STATE
from distlm.training.job import Text
from distlm.training.memory.job import MemoryJob, take_memories
from distlm.training.update import Outcome, Part, combine
from distlm.training.validate import Validation

ROWS_PER_S = "perf/rows_per_s"
EXTRA = "memory-extra.safetensors"
"""What a checkpoint keeps of a memory whose values are frozen: all but the values."""


class FinetuneJob(MemoryJob[FinetuneState]):
    """`stage.config.train` is what `train_config` makes of the section finetune; `stage.run` the seed's own folder."""

    unit = ROWS_PER_S
    keeps_best = False
    CALMER = (
        "lower finetune.lr, raise finetune.warmup or lower finetune.clip_norm, and start with another finetune.name="
    )
    rows_at_once, files_of_deepspeed = "finetune.micro_rows", "finetune.deepspeed"
    RATE_OF_VALUES = "finetune.memory_lr"
    train: PlmTraining
    model: TaskModelConfig
    net: TaskModel

    def __init__(
        self, stage: Stage, config: FinetuneConfig, task: TaskData, source: Source, exchange: Exchange
    ) -> None:
        """`config` has no defaults left. The `exchange` joins the ranks that share the memory."""
        train, ranks = stage.config.section(PlmTraining), stage.comm.size
        micro = plan_finetune_rows(config, ranks)
        self.values_frozen = config.memory == "frozen"
        model = self.describe(config, task, source)
        text = Text(task.fingerprint, source.tokenizer_hash, source.vocabulary)
        super().__init__(stage, text, micro, merge_ds_config(train, train.micro_blocks, micro.accumulation), model)
        self.config, self.task, self.source, self.exchange = config, task, source, exchange
        self.updates = train.updates
        self.scorer = TaskScorer(task, train.micro_blocks)
        self.before: dict[str, TaskMemoryUse] | None = None
        self.scored: TaskValidation | None = None
        """What dev was scored last, in this start."""

    def describe(self, config: FinetuneConfig, task: TaskData, source: Source) -> TaskModelConfig:
        """The model that is trained."""
        return TaskModelConfig(
            source.backbone if config.dropout < 0 else with_dropout(source.backbone, config.dropout),
            _memory(source.memory, config) if source.memory else {},
            source.seed,
            task.head,
            task.outputs,
            task.name,
        )

    def begin(self, resume: Resume[FinetuneState] | None) -> None:
        super().begin(resume)
        if resume is None and self.net.memories:
            self.before = self.score().memory

    def fixed_rows(self) -> str:
        return "; what is begun here is of these: give it another finetune.name"

    def fresh_model(self) -> TaskModel:
        self.net = self.build()
        together(self.comm, lambda: start_from_source(self.net, self.source))
        together(self.comm, self._load_memory)
        return self.net

    def resumed(self, resume: Resume[FinetuneState]) -> None:
        if (resume.folder / EXTRA).exists():
            self._load_memory()
            extra = read_tensors(resume.folder / EXTRA)
            for layer, memory in self.net.memories.items():
                memory.load_extra(_of_layer(extra, layer))
            return
        super().resumed(resume)

    def objective(self, model: TaskModel) -> TaskModule:
        self.make_values(MemoryConfig(**self.model.memory) if self.model.memory else MemoryConfig())
        return TaskModule(model)

    def optimizer(self, objective: nn.Module) -> torch.optim.Optimizer:
        """Adam with decoupled weight decay on everything that is not a bias or of a norm."""
        parameters = list(objective.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.train.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        first, second = self.train.adam_betas
        return torch.optim.AdamW(groups, lr=self.train.lr, betas=(first, second), eps=self.train.adam_eps, fused=True)

    def fresh_state(self) -> FinetuneState:
        return self.state_of(
            FinetuneState, blocks_per_update=self.train.blocks_per_update, source=self.source.fingerprint,
            memory_before=self.before,
        )  # fmt: skip

    def run_update(self, state: FinetuneState) -> tuple[Outcome, float]:
        """The loss is the mean over the update's rows."""
        train, micro, engine, update = self.train, self.micro, self.engine, state.update
        rate, rows = learning_rate(train, update), self.task.train
        numbers = rows_for_update(train.seed, update, train.blocks_per_update, len(rows))
        # DeepSpeed averages over the pieces of all ranks, hence their number as a factor.
        scale = micro.micro_batches / len(numbers)
        mine = micro.of_rank(self.comm.rank)
        self.begin_update(update + 1)
        sums, given = [], 0
        for piece in mine:
            whole = piece // micro.ranks * train.micro_blocks
            length = rows.padded_length(numbers[whole : whole + train.micro_blocks])
            where = micro.blocks_of(piece)
            chosen = numbers[where]
            batch = rows.batch(chosen, length)
            tensors = (
                *(torch.from_numpy(array) for array in batch),
                row_keys(train.seed, update, range(where.start, where.stop)),
                targets_of(rows, chosen),
            )
            output = engine.forward(*(tensor.to(engine.device) for tensor in tensors))
            loss = engine.module.loss(output.losses, scale)  # type: ignore[operator]
            engine.backward(loss, last=piece == mine[-1])
            sums.append(output.losses.detach().sum(dtype=torch.float64)[None])
            given += sum(
                xxhash.xxh32_intdigest(row[kept].tobytes()) for row, kept in zip(batch.tokens, batch.text, strict=True)
            )
        step = self.step(rate)
        part = Part(rate, len(numbers), sums, given, self.stage.stop.reason is not None)
        return combine(part, (), micro, step, train.precision), rate

    def validation_due(self, state: FinetuneState) -> bool:
        """At the end of each epoch."""
        rows, size = len(self.task.train), self.train.blocks_per_update
        done = state.update * size
        return self.finished(state) or done // rows > (done - size) // rows

    def validate(self, state: FinetuneState) -> Validation:
        return self.score()

    def judged(self, state: FinetuneState, result: Validation) -> Values:
        assert isinstance(result, TaskValidation)
        state.epochs.append({"update": state.update, "loss": result.loss, **result.scores})
        if self.finished(state):
            state.memory_after = result.memory
        return {}

    def write(self, folder: Path, extra: Mapping[int, Mapping[str, Tensor]]) -> None:
        if not self.values_frozen or self.config.keep_models:
            super().write(folder, extra)
        elif extra and self.comm.rank == 0:
            tensors = {f"{layer}/{name}": value for layer, found in extra.items() for name, value in found.items()}
            safetensors.torch.save_file(tensors, folder / EXTRA)
        if self.config.keep_models and self.comm.rank == 0:
            (folder / TOKENIZER).write_text(self.source.tokenizer.to_str(), "utf-8")

    def score(self) -> TaskValidation:
        """Of dev. Collective. Raises DistlmError when the loss is not finite."""
        self.scored = self.scorer.run(self.engine, self.net, self.comm.rank, self.comm.size)
        return self.scored

    def outputs(self, finished: Path) -> Outputs:
        """What the trained model gives for dev, as it was scored last, and for test. Collective.

        `finished`: its checkpoint, from which a start that had nothing left to do takes it.
        """
        if self.scored is None:
            self.begin(Resume(finished, FinetuneState.read(finished / STATE)))
            self.score()
        assert self.scored is not None
        return {**self.scored.outputs, **self.run_tests()}

    def run_tests(self) -> Outputs:
        """What the model gives for test. Collective."""
        return self.scorer.run_tests(self.engine, self.net, self.comm.rank, self.comm.size)

    def build(self) -> TaskModel:
        return TaskModel(self.model, self.text.vocabulary, self.exchange)

    def _load_memory(self) -> None:
        """The source's values and query statistics; moments and counters start anew."""
        if self.net.memories:
            assert self.source.folder is not None
            take_memories(self.net.memories, self.source.memory, self.source.folder)


class EvaluationJob(FinetuneJob):
    """A fine-tuned model that is not trained: `source` has its head and says what it is."""

    def describe(self, config: FinetuneConfig, task: TaskData, source: Source) -> TaskModelConfig:
        assert source.task is not None
        return source.task

    def begin(self, resume: Resume[FinetuneState] | None) -> None:
        # The model as it is, without a score of its own before.
        MemoryJob.begin(self, resume)

    def fresh_model(self) -> TaskModel:
        self.net = self.build()
        together(self.comm, lambda: start_from_source(self.net, self.source, whole=True))
        together(self.comm, self._load_memory)
        return self.net

    def _load_memory(self) -> None:
        if not self.net.memories:
            return
        assert self.source.folder is not None
        # With what memory.stale=catch_up still owes: made up for in the table it would round otherwise than it did
        # when the training scored.
        owed = MemoryConfig(**self.model.memory).stale == "catch_up"
        restore_memories(self.net.memories, self.source.folder, moments=owed)


def train_config(config: FinetuneConfig, seed: int, rows: int) -> PlmTraining:
    """The section train of one seed's fine-tuning on `rows` rows; `config` has no defaults left."""
    updates = max(1, -(-rows * config.epochs // config.rows_per_update))
    return PlmTraining(
        seed=seed, blocks_per_update=config.rows_per_update, micro_blocks=config.micro_rows, updates=updates,
        optimizer="adam", adam_betas=config.adam_betas, adam_eps=config.adam_eps, weight_decay=config.weight_decay,
        clip_norm=config.clip_norm, schedule="linear", lr=config.lr, min_lr=0.0,
        warmup_updates=round(config.warmup * updates), warmup_init_lr=0.0, precision=config.precision,
        deepspeed=config.deepspeed, valid_every=0, save_every=config.save_every, keep_last=1,
        max_updates_this_run=config.max_updates_this_run,
    )  # fmt: skip


def _memory(found: Mapping[str, Any], config: FinetuneConfig) -> dict[str, Any]:
    """MemoryConfig of the source, with what fine-tuning decides."""
    return asdict(replace(MemoryConfig(**found), lr=config.memory_lr, frozen=config.memory == "frozen"))


def _of_layer(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    return {name.partition("/")[2]: value for name, value in tensors.items() if name.partition("/")[0] == str(layer)}
