"""Training the AWD-LSTM: chunks of contiguous columns with the hidden state carried on, NT-ASGD, fine-tuning.

The unit of work is a micro-batch of columns. Chunk lengths are keyed by (seed, epoch), masks by (seed, update) and the
global column; hidden states belong to columns. So R ranks do what one rank does, up to the order of sums.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from distlm.config.schema import TrainConfig
from distlm.data.blocks import require_ids
from distlm.data.tokens import TokenFiles
from distlm.errors import UsageError
from distlm.models.awd_lstm.bptt import ChunkPlan, columns_of
from distlm.models.awd_lstm.config import AwdConfig, LstmConfig, LstmTraining
from distlm.models.awd_lstm.lstm import State
from distlm.models.awd_lstm.model import AwdLstm, Columns
from distlm.models.awd_lstm.nt_asgd import AVERAGE, NTASGD
from distlm.models.awd_lstm.objective import StreamModule
from distlm.models.awd_lstm.phases import (
    ASGD,
    FINETUNE,
    begin_finetuning,
    finetune_epochs,
    judge,
)
from distlm.models.awd_lstm.records import EpochSums, LstmState
from distlm.models.awd_lstm.stream_loss import StreamValidator
from distlm.models.complete import check_files
from distlm.models.described import require_tap
from distlm.models.io import read_weights
from distlm.models.perplexity import perplexity
from distlm.models.tensor_file import read_tensors
from distlm.runtime.metrics import Values
from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import together
from distlm.runtime.stage import Stage
from distlm.training.checkpoint import HIDDEN, Resume
from distlm.training.dsconfig import DeepSpeedConfig, merge_ds_config, offloaded, zero_stage
from distlm.training.job import Job, Kept, Text
from distlm.training.microbatch import MicroBatchPlan, fewer, mend, micro_seed
from distlm.training.objective import Objective
from distlm.training.update import Outcome, Part, combine
from distlm.training.validate import Validation

AR, TAR = "train/ar", "train/tar"


class LstmJob(Job[LstmState]):
    """`awd.epochs` epochs and then at most `awd.finetune_epochs` of fine-tuning."""

    CALMER = "lower train.lr or train.clip_norm, and start with another run_dir="
    rows_at_once = "awd.micro_batch"
    may_offload = False
    train: LstmTraining

    def __init__(self, stage: Stage, tokens: TokenFiles, micro: MicroBatchPlan, deepspeed: DeepSpeedConfig) -> None:
        super().__init__(stage, Text.of(tokens), micro, deepspeed)
        self.awd, self.lstm = stage.config.section(AwdConfig), stage.config.section(LstmConfig)
        require_tap(self.lstm, self.train.tap, "train.tap")
        self.tap = self.train.tap
        awd = self.awd
        self.columns = columns_of(tokens.split("train"), awd.batch, "awd.batch", "train")
        length = self.columns.shape[1]
        self.plan = ChunkPlan(
            length, awd.bptt, awd.variable_length, self.train.seed, awd.epochs, finetune_epochs(awd)
        )  # fmt: skip
        self.updates = self.plan.updates
        self.validator = StreamValidator(tokens.split("valid"), awd.valid_batch, awd.bptt)
        self.hidden: dict[int, list[State]] = {}
        """Micro-batch of this rank → its states before the next chunk; empty at the start of an epoch."""
        self.began = 0.0
        """When the update began."""

    @property
    def highest_stage(self) -> int:
        return 2

    @property
    def rows_now(self) -> int:
        return self.micro.micro_blocks

    def fixed_rows(self) -> str:
        return ""

    @staticmethod
    def open(stage: Stage) -> "LstmJob":
        """Read the token files and check the settings against them and the rank count. Raises DistlmError."""
        train, micro = stage.config.train, plan_columns(stage.config.section(AwdConfig), stage.comm.size)
        deepspeed = merge_ds_config(train, micro.micro_blocks, micro.accumulation)
        refuse_zero_stage(train, deepspeed)
        return LstmJob(stage, TokenFiles.open(stage.run.tokens(stage.config)), micro, deepspeed)

    def fresh_state(self) -> LstmState:
        return self.state_of(LstmState, lstm=self.lstm, awd=self.awd)

    def objective(self, model: Any) -> StreamModule:
        assert isinstance(model, AwdLstm)
        return StreamModule(model, self.awd.ar, self.awd.tar)

    def optimizer(self, objective: Objective) -> NTASGD:
        train = self.train
        return NTASGD(objective.parameters(), train.lr, train.weight_decay, self.awd.reference_eta_lag,
                      self.awd.average_from == "trigger")  # fmt: skip

    def finished(self, state: LstmState) -> bool:
        return state.stopped or state.update >= self.updates

    def validation_due(self, state: LstmState) -> bool:
        chunk, every = self.plan.chunk(state.update - 1), self.awd.log_interval
        due = chunk.last or (every > 0 and (chunk.number + 1) % every == 0)
        return self.finished(state) or (due and self.train.valid_every > 0)

    def run_update(self, state: LstmState) -> tuple[Outcome, float]:
        """Chunk of all columns: mean CE + α·AR + β·TAR over them, at the rate lr · drawn length / bptt."""
        train, micro, engine, update = self.train, self.micro, self.engine, state.update
        self.began = time.monotonic()
        chunk = self.plan.chunk(update)
        if chunk.epoch >= self.awd.epochs and state.phase != FINETUNE:
            self._begin_finetuning(state)
        rate = train.lr * chunk.drawn / self.awd.bptt * 0.5**state.halvings
        if chunk.number == 0:
            self.hidden = {number: self._model.zero_states(micro.micro_blocks) for number in self._mine}
        sums, given = [], 0
        for number in self._mine:
            where = micro.blocks_of(number)
            words = np.asarray(self.columns[where, chunk.start : chunk.start + chunk.length + 1], dtype=np.int64)
            require_ids(words.ravel(), self._model.vocabulary)
            tokens = torch.from_numpy(np.ascontiguousarray(words.T)).to(engine.device)
            # The same for all micro-batches: they draw the masks of the whole batch and take their columns.
            torch.manual_seed(micro_seed(train.seed, update, 0))
            result, self.hidden[number] = engine.forward(
                tokens[:-1], tokens[1:], self.hidden[number], Columns(where.start, self.awd.batch)
            )
            # DeepSpeed averages over the M micro-batches of all ranks, hence the factor M.
            loss = engine.module.loss(result, chunk.length, self.awd.batch, micro.micro_batches)  # type: ignore[operator]
            engine.backward(loss, last=number == self._mine[-1])
            sums.append(torch.stack([value.detach() for value in result]))
            given += sum(
                xxhash.xxh32_intdigest(row.tobytes(), seed=column) for column, row in enumerate(words, where.start)
            )
        step = engine.update(rate)
        tokens_given = chunk.length * self.awd.batch
        part = Part(rate, tokens_given, sums, given, self.stage.stop.reason is not None)
        return combine(part, (AR, TAR), micro, step, train.precision), rate

    def counted(self, state: LstmState, outcome: Outcome) -> None:
        chunk = self.plan.chunk(state.update - 1)
        if chunk.number == 0:
            state.epoch = EpochSums(chunk.epoch + 1)
        epoch = state.epoch
        epoch.ce += outcome.ce
        epoch.tokens += outcome.tokens
        # Updates alone: validation and saving are no part of an epoch's speed.
        epoch.seconds += time.monotonic() - self.began
        state.last |= {"phase": state.phase, "epoch": epoch.number}
        if chunk.last:
            self.hidden = {}
        state.finished = self.finished(state)

    def validate(self, state: LstmState) -> Validation:
        """With the averages in place of the weights, where there are averages."""
        if not _averaging(state):
            return self.validator.run(self.engine, self._model, self.comm.rank, self.comm.size)
        with self.engine.weights_from(AVERAGE):
            return self.validator.run(self.engine, self._model, self.comm.rank, self.comm.size)

    def judged(self, state: LstmState, result: Validation) -> Values:
        epoch, phase = state.epoch, state.phase
        decision = judge(state, self.awd, epoch.number, result.loss)
        entry, rank = state.log[-1], self.comm.rank
        if decision == "average":
            self.engine.start_averaging()
        elif decision == "stop":
            state.finished = True
        if decision:
            what = {
                "average": "NT-ASGD averages from here on",
                "stop": "fine-tuning is done",
                "halve": "the rate halves",
            }
            say(
                f"train: epoch {epoch.number}: trigger ({self.awd.trigger}): {result.loss:.4f} > "
                f"{entry.least:.4f}: {what[decision]}", rank,
            )  # fmt: skip
        speed = epoch.tokens / epoch.seconds if epoch.seconds else None
        return {
            "train/epoch": epoch.number, "train/phase": phase, "train/epoch_loss": epoch.ce / epoch.tokens,
            "train/epoch_ppl": perplexity(epoch.ce / epoch.tokens),
            "perf/epoch_tokens_per_s": None if speed is None else round(speed, 1),
            "perf/epoch_seconds": round(epoch.seconds, 3),
            "trigger/rule": entry.rule, "trigger/least": entry.least, "trigger/fired": entry.fired,
        }  # fmt: skip

    def kept(self, state: LstmState) -> Kept:
        mine = {number: [tensor.cpu() for pair in states for tensor in pair] for number, states in self.hidden.items()}
        everyone = self.comm.gather(mine)
        hidden: dict[str, Tensor] = {}
        if everyone is not None and mine:
            by_number = {number: tensors for of_rank in everyone for number, tensors in of_rank.items()}
            for index, name in enumerate(self._hidden_names()):
                hidden[name] = torch.cat([by_number[number][index] for number in sorted(by_number)], dim=1)
        return Kept(AVERAGE if _averaging(state) else None, hidden)

    def resumed(self, resume: Resume[LstmState]) -> None:
        state = resume.state
        # The epochs may have grown.
        state.awd, state.finished = self.awd, self.finished(state)
        path = resume.folder / HIDDEN
        if not path.exists():
            return
        tensors = read_tensors(path)
        names = self._hidden_names()
        for number in self._mine:
            flat = [tensors[name][:, self.micro.blocks_of(number)].to(self.engine.device) for name in names]
            self.hidden[number] = list(zip(flat[::2], flat[1::2], strict=True))

    @property
    def _model(self) -> AwdLstm:
        model = self.engine.module.model
        assert isinstance(model, AwdLstm)
        return model

    @property
    def _mine(self) -> range:
        return self.micro.of_rank(self.comm.rank)

    def _hidden_names(self) -> list[str]:
        return [f"{part}.{layer}" for layer in range(self.lstm.layers) for part in ("h", "c")]

    def _begin_finetuning(self, state: LstmState) -> None:
        """Go on from the weights with the best validation loss, averaging anew. Collective."""
        assert state.best is not None
        folder = self.stage.run.checkpoints / state.best.checkpoint
        weights = together(self.comm, lambda: _best_weights(folder))
        self.engine.set_weights(weights)
        self.engine.start_averaging()
        begin_finetuning(state)
        say(f"train: fine-tuning from {folder} (valid loss {state.best.valid_loss:.4f})", self.comm.rank)


def plan_columns(awd: AwdConfig, ranks: int) -> MicroBatchPlan:
    """Deal the columns to the ranks in micro-batches. Raises DistlmError when they do not divide."""
    if awd.batch < ranks:
        raise UsageError(f"awd.batch={awd.batch} is smaller than the {ranks} ranks; start {awd.batch} ranks or fewer")
    micro = awd.micro_batch or (awd.batch // ranks if awd.batch % ranks == 0 else 1)
    count = awd.batch // micro
    if awd.batch % ranks or count % ranks:
        names = "awd.batch", "awd.micro_batch"
        raise UsageError(
            f"awd.batch={awd.batch} columns in micro-batches of {micro} do not divide over {ranks} ranks; "
            f"{mend(names, (awd.batch, micro), 1, ranks, fewer(count, ranks))}"
        )
    return MicroBatchPlan(micro, count, ranks)


def refuse_zero_stage(train: TrainConfig, deepspeed: DeepSpeedConfig) -> None:
    """ZeRO 0 keeps weights and averages on every rank, 1 and 2 shard the averages (and gradients); both are supported.

    Raises DistlmError for ZeRO 3, which shards the weights: they would be gathered for every time step's worth of work
    of a model that fits on any device, and the averages again for every validation; and for offloaded states.
    """
    if zero_stage(deepspeed) == 3:
        raise UsageError(
            f"train.deepspeed={train.deepspeed}: ZeRO stage 3 shards the weights, and NT-ASGD's averages are "
            "swapped in for them whole; set train.deepspeed=zero0 (every rank averages), zero1 or "
            "zero2 (averages are sharded)"
        )
    if offloaded(deepspeed).optimizer:
        raise UsageError(
            f"train.deepspeed={train.deepspeed}: offload_optimizer would move NT-ASGD's averages off the device that "
            "updates them in every step; set train.deepspeed=zero1 or zero2 (averages are sharded)"
        )


def _averaging(state: LstmState) -> bool:
    return state.phase in (ASGD, FINETUNE)


def _best_weights(folder: Path) -> dict[str, Tensor]:
    check_files(
        folder, "fine-tuning starts from this checkpoint; put it back from a copy, or start anew with another run_dir="
    )
    return read_weights(folder)[0]
