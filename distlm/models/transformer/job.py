"""Training a transformer: updates over shuffled blocks of the corpus."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from distlm.config.schema import TrainConfig
from distlm.data.blocks import gather, training_blocks
from distlm.data.order import rows_for_update
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.device import default_device
from distlm.models.kinds import AnyModelConfig
from distlm.models.transformer.regularisers.exchange import UpdateWords
from distlm.models.transformer.regularisers.tables import uses_queues
from distlm.models.transformer.regularisers.word_pull import WordPull
from distlm.optim.nag import NAG
from distlm.optim.schedule import learning_rate
from distlm.runtime import metrics
from distlm.runtime.stage import Stage
from distlm.training.checkpoint import Resume
from distlm.training.dsconfig import merge_ds_config, zero_stage
from distlm.training.job import Job, Kept, Text
from distlm.training.microbatch import MicroBatchPlan, micro_seed, plan_micro_batches
from distlm.training.objective import TrainModule
from distlm.training.update import Outcome, Part, combine
from distlm.training.validate import Validation, Validator


class TransformerJob(Job):
    """`train.updates` updates of `train.blocks_per_update` blocks."""

    def __init__(
        self, stage: Stage, tokens: TokenFiles, micro: MicroBatchPlan, deepspeed: dict[str, Any],
        model: AnyModelConfig | None = None,
    ) -> None:  # fmt: skip
        super().__init__(stage, Text.of(tokens), micro, deepspeed, model)
        self.updates = self.train.updates
        self.ids = tokens.split("train")
        self.blocks = training_blocks(len(self.ids), self.train.tokens_per_sample)
        self.validator = Validator.in_training(tokens, self.train)
        self.queues: WordPull | None = None
        """Eq. 1 of Ton et al., where it is asked for."""

    @staticmethod
    def open(stage: Stage) -> "TransformerJob":
        """Read the token files and check the settings against them and the rank count. Raises DistlmError."""
        train = stage.config.train
        micro = plan_micro_batches(train, stage.comm.size)
        deepspeed = merge_ds_config(train.deepspeed, train, micro.accumulation)
        if uses_queues(train) and zero_stage(deepspeed) == 3:
            raise DistlmError(
                f"train.deepspeed={train.deepspeed}: ZeRO stage 3 shards the weights, and the momentum encoder of "
                f"train.regulariser={train.regulariser} is a whole copy that follows them; set train.deepspeed=zero2, "
                "or train.regulariser=l2"
            )
        if train.tokens_per_sample > stage.config.model.max_positions:
            raise DistlmError(
                f"train.tokens_per_sample={train.tokens_per_sample} is longer than "
                f"model.max_positions={stage.config.model.max_positions}; raise the latter"
            )
        return TransformerJob(stage, TokenFiles.open(stage.run.tokens(stage.config)), micro, deepspeed)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"blocks_per_update": self.train.blocks_per_update}

    def objective(self, model: Any) -> TrainModule:
        if uses_queues(self.train):
            self.queues = WordPull(self.train, model, self.comm.rank, self.comm.size, default_device())
        return TrainModule(model, self.train.tap, self.train.l2_weight, self.train.l2_reduction)

    def optimizer(self, objective: torch.nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(self.train, objective)

    def run_update(self, state: dict[str, Any]) -> tuple[Outcome, float]:
        """The loss is fairseq's: Σ token CE / number of tokens, whatever the cut."""
        train, micro, engine, update = self.train, self.micro, self.engine, state["update"]
        rate = learning_rate(train, update)
        rows = rows_for_update(train.seed, update, train.blocks_per_update, len(self.blocks))
        tokens = int(self.blocks.scored[rows].sum())
        # DeepSpeed averages over the M micro-batches of all ranks, hence the factor M.
        scale = micro.micro_batches / tokens
        mine = micro.of_rank(self.comm.rank)
        queues = self.queues
        if queues is not None:
            spans = zip(self.blocks.start[rows], self.blocks.end[rows], strict=True)
            queues.begin(UpdateWords.of([self.ids[start:end] for start, end in spans], micro))
        sums, given = [], 0
        for number in mine:
            chosen = rows[micro.blocks_of(number)]
            batch = gather(self.ids, self.blocks, chosen)
            inputs, targets = (torch.from_numpy(array).to(engine.device) for array in (batch.inputs, batch.targets))
            scored = None if batch.scored.all() else torch.from_numpy(batch.scored).to(engine.device)
            torch.manual_seed(micro_seed(train.seed, update, number))
            result = engine.forward(inputs, targets, scored, None if queues is None else queues.target(number))
            if queues is not None:
                queues.encode(inputs, scored)
            loss = engine.module.loss(result, scale)  # type: ignore[operator]
            engine.backward(loss, last=number == mine[-1])
            sums.append(torch.stack([value.detach() for value in result]))
            given += _fingerprint(batch.targets, self.blocks.lengths[chosen])
        step = engine.update(rate)
        if queues is not None:
            queues.end(engine.names)
        part = Part(update, rate, tokens, sums, given, self.stage.stop.reason is not None)
        return combine(part, (metrics.TRAIN_PENALTY, metrics.TRAIN_NORM), micro, step, train.precision), rate

    def validate(self, state: dict[str, Any]) -> Validation:
        return self.validator.run(self.engine, self.comm.rank, self.comm.size)

    def kept(self, state: dict[str, Any]) -> Kept:
        return Kept() if self.queues is None else Kept(write=self.queues.save)

    def resumed(self, resume: Resume) -> None:
        if self.queues is not None:
            self.queues.load(resume.folder)


def make_optimizer(train: TrainConfig, module: torch.nn.Module) -> torch.optim.Optimizer:
    """`train.optimizer` over all parameters; weight decay is decoupled in both."""
    if train.optimizer == "nag":
        return NAG(module.parameters(), lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    first, second = train.adam_betas
    # Fused: one pass over the memory instead of ten.
    return torch.optim.AdamW(
        module.parameters(), lr=train.lr, betas=(first, second), eps=train.adam_eps,
        weight_decay=train.weight_decay, fused=True,
    )  # fmt: skip


def _fingerprint(targets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> int:
    """Σ over rows of 32 bits of the hash of their tokens, padding left out: exact in fp64 for 2^21 rows."""
    return sum(xxhash.xxh32_intdigest(row[:length].tobytes()) for row, length in zip(targets, lengths, strict=True))
