"""Training in blocks: updates over shuffled blocks of the corpus, for any model that predicts the next word."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from distlm.config.training import BlocksConfig
from distlm.data.blocks import gather, training_blocks
from distlm.data.order import rows_for_update
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.memory.placing import WithMemory
from distlm.models.card import model_of_card
from distlm.models.described import build_model, has_memory, require_tap
from distlm.models.io import read_weights
from distlm.models.kind import CausalDescription
from distlm.models.row_dropout import row_keys
from distlm.optim.make import make_optimizer
from distlm.optim.schedule import learning_rate
from distlm.runtime import metrics
from distlm.runtime.stage import Stage
from distlm.training.blocks.plan import plan_blocks_cut
from distlm.training.checkpoint import Resume
from distlm.training.dsconfig import DeepSpeedConfig, merge_ds_config
from distlm.training.job import Job, Kept, Text
from distlm.training.memory.job import MemoryJob, require_same_places, take_memories, use_since_last
from distlm.training.memory.objective import objective_of
from distlm.training.memory.start import take_dense
from distlm.training.microbatch import MicroBatchPlan, micro_seed
from distlm.training.objective import Pull, TrainModule
from distlm.training.records import UpdatesState
from distlm.training.start.init_from import take_weights
from distlm.training.update import Outcome, Part, combine
from distlm.training.validate import Validation, Validator


class Regulariser(Protocol):
    """What the states of each token are pulled to in the course of an update."""

    def begin(self, texts: Sequence[npt.NDArray[Any]], micro: MicroBatchPlan) -> None:
        """Of an update with these target tokens, block by block. Collective."""

    def target(self, number: int) -> Pull:
        """Where the tokens of a micro-batch of this rank are pulled to. Local."""

    def encode(self, inputs: Tensor, scored: Tensor | None) -> None:
        """A micro-batch of this rank, in order. Local."""

    def end(self, weights: Mapping[str, Tensor]) -> None:
        """The update is done; `weights` are the new ones. Collective."""

    def save(self, folder: Path) -> None:
        """This rank's files of a checkpoint. Local. Raises OSError when the disk is full."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote on any number of ranks. Local. Raises DistlmError."""


class BlocksJob(MemoryJob[UpdatesState]):
    """`train.updates` updates of `train.blocks_per_update` blocks.

    A micro-batch is of one rank. For a model with memories it is of all ranks, and each computes a contiguous piece of
    it: a memory pools the statistics of its queries over the micro-batch, and its columns may lie on several ranks.
    Then dropout belongs to (seed, update, row), and all ranks go in step with equally many tokens.
    """

    train: BlocksConfig
    model: CausalDescription

    def __init__(
        self, stage: Stage, tokens: TokenFiles, micro: MicroBatchPlan, deepspeed: DeepSpeedConfig,
        model: CausalDescription | None = None,
    ) -> None:  # fmt: skip
        super().__init__(stage, Text.of(tokens), micro, deepspeed, model)
        assert isinstance(self.model, CausalDescription)
        require_tap(self.model, self.train.tap, "train.tap")
        self.tap = self.train.tap
        self.updates = self.train.updates
        self.ids = tokens.split("train")
        self.blocks = training_blocks(len(self.ids), self.train.tokens_per_sample)
        self.settings: MemoryConfig | None = None
        """Those of its memories; None: it has none."""
        if has_memory(self.model):
            self.settings = stage.config.section(MemoryConfig)
        self.validator = Validator.in_training(tokens, self.train, self.model.begins, even=self.settings is not None)
        self.regulariser: Regulariser | None = None
        """Besides ‖r‖², where it is asked for."""

    @staticmethod
    def parts(stage: Stage) -> tuple[TokenFiles, MicroBatchPlan, DeepSpeedConfig]:
        """Token files, micro-batches and DeepSpeed's configuration for this number of ranks. Raises DistlmError."""
        train = stage.config.section(BlocksConfig)
        micro = plan_blocks_cut(stage.config, stage.comm.size)
        deepspeed = merge_ds_config(train, train.micro_blocks, micro.accumulation)
        return TokenFiles.open(stage.run.tokens(stage.config)), micro, deepspeed

    def fresh_state(self) -> UpdatesState:
        return self.state_of(UpdatesState, blocks_per_update=self.train.blocks_per_update)

    def build(self) -> Any:
        return build_model(self.model, self.text.vocabulary)

    def fresh_model(self) -> Any:
        self.net = self.build()
        return self.net

    def saved_model(self, resume: Resume[UpdatesState]) -> Any:
        if self.settings is None:
            self.net = Job.saved_model(self, resume)
            return self.net
        return super().saved_model(resume)

    def start_from(self, model: Any, folder: Path) -> None:
        """A model without memory gives its weights to one with a memory, which starts fresh; one with a memory gives
        that, too."""
        weights, card = read_weights(folder)
        described, source = model_of_card(card), f"train.init_from={folder}"
        theirs = described.memory if isinstance(described, WithMemory) else {}
        if self.settings is not None and not theirs:
            take_dense(model, self.settings, weights, card, self.text.dictionary, source)
            return
        if theirs and self.settings is None:
            raise DistlmError(
                f"{source}: has a memory, which would be lost (memory.kind=none); set memory.* as there, e.g. "
                f"memory.kind={theirs['kind']}"
            )
        if theirs:
            require_same_places(model.memories, theirs, folder)
        take_weights(model, weights, card, self.text.dictionary, source)
        if theirs:
            take_memories(model.memories, theirs, folder)

    def objective(self, model: Any) -> TrainModule:
        self.net = model
        self.make_values(self.settings or MemoryConfig())
        return objective_of(model, self.train.tap, self.train.l2_weight, self.train.l2_reduction)

    def optimizer(self, objective: torch.nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(self.train, objective)

    def run_update(self, state: UpdatesState) -> tuple[Outcome, float]:
        """The loss is fairseq's: Σ token CE / number of tokens, whatever the cut."""
        train, micro, engine, update = self.train, self.micro, self.engine, state.update
        rate = learning_rate(train, update)
        rows = rows_for_update(train.seed, update, train.blocks_per_update, len(self.blocks))
        tokens = int(self.blocks.scored[rows].sum())
        # DeepSpeed averages over the M micro-batches of all ranks, hence the factor M.
        scale = micro.micro_batches / tokens
        mine = micro.of_rank(self.comm.rank)
        pulls = self.regulariser
        if pulls is not None:
            spans = zip(self.blocks.start[rows], self.blocks.end[rows], strict=True)
            pulls.begin([self.ids[start:end] for start, end in spans], micro)
        self.begin_update(update + 1)
        sums, given, vocabulary = [], 0, self.text.vocabulary
        for number in mine:
            where = micro.blocks_of(number)
            chosen = rows[where]
            least = self._length(rows, number)
            batch = gather(self.ids, self.blocks, chosen, begins=self.model.begins, least=least, vocabulary=vocabulary)
            inputs, targets = (torch.from_numpy(array).to(engine.device) for array in (batch.inputs, batch.targets))
            scored = None if batch.scored.all() else torch.from_numpy(batch.scored).to(engine.device)
            torch.manual_seed(micro_seed(train.seed, update, number))
            given_to = [inputs, targets, scored, None if pulls is None else pulls.target(number)]
            if self.settings is not None:
                keys = row_keys(train.seed, update, range(where.start, where.stop))
                given_to.append(keys.to(engine.device))
            result = engine.forward(*given_to)
            if pulls is not None:
                pulls.encode(inputs, scored)
            loss = engine.module.loss(result, scale)  # type: ignore[operator]
            engine.backward(loss, last=number == mine[-1])
            sums.append(torch.stack([value.detach() for value in result]))
            given += _fingerprint(batch.targets, self.blocks.lengths[chosen])
        step = self.step(rate)
        if pulls is not None:
            pulls.end(engine.names)
        part = Part(rate, tokens, sums, given, self.stage.stop.reason is not None)
        return combine(part, (metrics.TRAIN_PENALTY, metrics.TRAIN_NORM), micro, step, train.precision), rate

    def validate(self, state: UpdatesState) -> Validation:
        return self.validator.run(self.engine, self.comm.rank, self.comm.size)

    def measured(self, keep: bool = False) -> metrics.Values:
        """Cost and use of each memory as memory/LAYER/NAME, since the last line."""
        if self.settings is None:
            return {}
        return super().measured(keep) | use_since_last(self.memories, keep)

    def kept(self, state: UpdatesState) -> Kept:
        if self.settings is not None:
            return super().kept(state)
        return Kept() if self.regulariser is None else Kept(write=self.regulariser.save)

    def resumed(self, resume: Resume[UpdatesState]) -> None:
        if self.settings is not None:
            super().resumed(resume)
        if self.regulariser is not None:
            self.regulariser.load(resume.folder)

    def _length(self, rows: npt.NDArray[Any], number: int) -> int:
        """Tokens that each row of a piece must have at least: as many as the longest of its micro-batch."""
        if self.settings is None:
            return 0
        size = self.micro.micro_blocks * self.micro.ranks
        first = number // self.micro.ranks * size
        return int(self.blocks.lengths[rows[first : first + size]].max())


def _fingerprint(targets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> int:
    """Σ over rows of 32 bits of the hash of their tokens, padding left out: exact in fp64 for 2^21 rows."""
    return sum(xxhash.xxh32_intdigest(row[:length].tobytes()) for row, length in zip(targets, lengths, strict=True))
