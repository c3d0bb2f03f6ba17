"""Training a masked language model with or without product-key memory.

The unit of work is a micro-batch of `train.micro_blocks` rows over all ranks: each rank takes an equal, contiguous
piece of it. All ranks go through the same micro-batches in step, because a memory pools the statistics of its queries
over the micro-batch and may have its values' columns on several ranks. Order and masks of rows are functions of
(seed, epoch, row), dropout of (seed, update, row): R ranks do what one rank does, up to the order of sums.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from distlm.data.shards.order import rank_places
from distlm.data.shards.reader import RowBatch, RowStream, ShardRows
from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.memory.values.exchange import Exchange
from distlm.models.card import model_of_card
from distlm.models.io import read_weights
from distlm.models.plm.config import PlmConfig, PlmTraining
from distlm.models.plm.description import PlmModel
from distlm.models.plm.init import start_from
from distlm.models.plm.measure.validate import PlmValidator
from distlm.models.plm.model import Plm
from distlm.models.plm.objective import MaskedModule
from distlm.models.plm.sizes import backbone_sizes
from distlm.models.plm.text.masking import NO_LABEL, mask_rows
from distlm.models.plm.text.pieces import plan_rows
from distlm.models.plm.text.short_rows import pieces_of_row, short_rows
from distlm.models.row_dropout import row_keys
from distlm.optim.make import make_optimizer
from distlm.optim.schedule import learning_rate
from distlm.runtime import metrics
from distlm.runtime.ranks.collective import together
from distlm.runtime.stage import Stage
from distlm.training.dsconfig import DeepSpeedConfig, merge_ds_config
from distlm.training.engine import share
from distlm.training.job import Text
from distlm.training.memory.job import MemoryJob, take_memories, use_since_last
from distlm.training.microbatch import MicroBatchPlan
from distlm.training.records import UpdatesState
from distlm.training.start.init_from import take_weights
from distlm.training.update import Outcome, Part, combine
from distlm.training.validate import Validation


class PlmJob(MemoryJob[UpdatesState]):
    """`train.updates` updates of `train.blocks_per_update` rows."""

    train: PlmTraining
    model: PlmModel
    net: Plm

    def __init__(
        self, stage: Stage, train: ShardRows, valid: ShardRows, micro: MicroBatchPlan, deepspeed: DeepSpeedConfig
    ) -> None:
        super().__init__(stage, Text(train.fingerprint, train.tokenizer.hash, train.vocabulary), micro, deepspeed)
        self.updates = self.train.updates
        self.model.backbone["pad_token_id"] = train.tokenizer.pad
        self.rows = train
        self.plm, self.settings = stage.config.section(PlmConfig), stage.config.section(MemoryConfig)
        self.short = short_rows(self.plm, self.train, train.row_tokens)
        self.stream: RowStream[list[_Piece]] | None = None
        self.waited = 0.0
        """Seconds waited for rows since the last line of metrics."""
        self.validator = PlmValidator(valid, self.train.micro_blocks, self.train.seed, self.plm.mask_share)

    @staticmethod
    def open(stage: Stage) -> "PlmJob":
        """Open the shards and check the settings against them and the rank count. Raises DistlmError."""
        train, folder = stage.config.section(PlmTraining), stage.run.shards(stage.config)
        micro = plan_rows(train, stage.comm.size)
        deepspeed = merge_ds_config(train, train.micro_blocks, micro.accumulation)
        rows = ShardRows.open(folder, "train")
        job = PlmJob(stage, rows, ShardRows.open(folder, "valid"), micro, deepspeed)
        longest, checkpoint = backbone_sizes(job.model.backbone).positions, job.plm.checkpoint
        if rows.row_tokens > longest:
            limit = (
                f"the {longest} positions of plm.checkpoint={checkpoint}; "
                if checkpoint
                else (f"plm.max_positions={longest}; raise the latter, or ")
            )
            raise DistlmError(
                f"{folder}: rows of {rows.row_tokens} tokens are longer than {limit}make shards with "
                f"shards.row_tokens={longest}"
            )
        return job

    def fresh_state(self) -> UpdatesState:
        return self.state_of(UpdatesState, blocks_per_update=self.train.blocks_per_update)

    def fresh_model(self) -> Plm:
        self.net = net = self.build()
        together(self.comm, lambda: start_from(net, self.plm, self.settings, self.text.dictionary))
        return net

    def start_from(self, model: nn.Module, folder: Path) -> None:
        """With its memory. A model without memory gives its weights to one with a memory as plm.init_from does."""
        weights, card = read_weights(folder)
        described = model_of_card(card)
        source = f"train.init_from={folder}"
        if not isinstance(described, PlmModel):
            raise DistlmError(f"{source}: a {card.kind}, not a masked language model")
        if bool(described.memory) != bool(self.net.memories):
            raise DistlmError(
                f"{source}: {'has a memory' if described.memory else 'has no memory'}, and memory.kind="
                f"{self.settings.kind}; set memory.* as there"
                + ("" if described.memory else f", or start a fresh memory beside it with plm.init_from={folder}")
            )
        take_weights(model, weights, card, self.text.dictionary, source)
        take_memories(self.net.memories, described.memory, folder)

    def objective(self, model: Plm) -> MaskedModule:
        self.make_values(self.settings)
        return MaskedModule(model)

    def optimizer(self, objective: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(self.train, objective)

    def run_update(self, state: UpdatesState) -> tuple[Outcome, float]:
        """The loss is Σ CE of the predicted tokens / their number, whatever the cut."""
        train, micro, engine, update = self.train, self.micro, self.engine, state.update
        rate = learning_rate(train, update)
        mine = self._next(update)
        self.begin_update(update + 1)
        # DeepSpeed averages over the pieces of all ranks, hence their number as a factor.
        tokens = int(sum(row[0] for row in share([float(sum(piece.predicted for piece in mine))])))
        scale = micro.micro_batches / tokens
        sums, given = [], 0
        for piece in mine:
            total = engine.forward(*(tensor.to(engine.device) for tensor in piece.tensors))
            engine.backward(engine.module.loss(total, scale), last=piece is mine[-1])  # type: ignore[operator]
            sums.append(total.detach()[None])
            given += piece.fingerprint
        step = self.step(rate)
        part = Part(rate, tokens, sums, given, self.stage.stop.reason is not None)
        return combine(part, (), micro, step, train.precision), rate

    def validate(self, state: UpdatesState) -> Validation:
        return self.validator.run(self.engine, self.comm.rank, self.comm.size)

    def measured(self, keep: bool = False) -> metrics.Values:
        """Seconds waited for rows, cost and use of each memory as memory/LAYER/NAME, since the last line; and staleness
        (KJ figure 2) of all updates so far."""
        found = super().measured(keep) | {metrics.DATA_WAIT_S: round(self.waited, 4)}
        if not keep:
            self.waited = 0.0
        return found | use_since_last(self.net.memories, keep)

    def build(self) -> Plm:
        return Plm(self.model, self.text.vocabulary, Exchange(self.settings.columns))

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()

    def _next(self, update: int) -> "list[_Piece]":
        """This rank's pieces of an update; the first call decides where the stream begins."""
        train = self.train
        if self.stream is None:
            places = rank_places(train.blocks_per_update, train.micro_blocks, self.comm.rank, self.comm.size)
            self.stream = RowStream(self.rows, train.seed, update, train.blocks_per_update, places, self._pieces)
            self.stream.__enter__()
        found = next(self.stream)
        self.waited += self.stream.waited_s
        return found

    def _pieces(self, batch: RowBatch) -> "list[_Piece]":
        """Mask the rows and cut them into this rank's pieces; in the reading thread."""
        seed, rows, size = self.train.seed, self.rows, self.micro.micro_blocks
        cut = pieces_of_row(self.short, rows.row_tokens, batch.update)
        inputs, labels = mask_rows(batch.tokens, batch.rows, batch.epochs, seed, rows.tokenizer, self.plm.mask_share)
        arrays = inputs, labels, rows.is_text(batch.tokens), rows.is_counted(batch.tokens)
        pieces = []
        for count, number in enumerate(self.micro.of_rank(self.comm.rank)):
            mine, where = slice(count * size, (count + 1) * size), self.micro.blocks_of(number)
            tensors = (torch.from_numpy(array[mine]).reshape(size * cut, -1) for array in arrays)
            keys = row_keys(seed, batch.update, range(where.start * cut, where.stop * cut))
            given = sum(xxhash.xxh32_intdigest(row.tobytes()) for row in batch.tokens[mine])
            pieces.append(_Piece((*tensors, keys), int((labels[mine] != NO_LABEL).sum()), given))
        return pieces


@dataclass(frozen=True)
class _Piece:
    """One rank's rows of a micro-batch."""

    tensors: tuple[Tensor, ...]
    """Arguments of MaskedModule.forward."""
    predicted: int
    """Tokens with a label."""
    fingerprint: int
    """Σ over rows of 32 bits of the hash of their tokens."""
