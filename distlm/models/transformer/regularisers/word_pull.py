"""Eq. 1 in the course of an update: queues are read before it, states that the encoder gave come in after it.

All reads see the queues as the update before left them, and pushes are in the order of blocks and tokens, so that
neither ranks nor micro-batches decide about anything.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distlm.models.language_model import LanguageModel
from distlm.models.transformer.config import TransformerTraining
from distlm.models.transformer.regularisers.encoder import MomentumEncoder
from distlm.models.transformer.regularisers.exchange import UpdateWords, WordExchange
from distlm.models.transformer.regularisers.files import load_encoder, load_table, save_encoder, save_table
from distlm.models.transformer.regularisers.penalty import Pull
from distlm.models.transformer.regularisers.tables import TABLES
from distlm.training.microbatch import MicroBatchPlan


class WordPull:
    """One rank's end of the queues of all words: those of the words that are its own, and the momentum encoder."""

    def __init__(
        self, train: TransformerTraining, model: LanguageModel, rank: int, ranks: int, device: torch.device
    ) -> None:
        """model: fresh from building or loading, fp32. Local."""
        self.rank, self.ranks = rank, ranks
        words = len(range(rank, model.vocabulary, ranks))
        self.table = TABLES[train.regulariser](words, model.width, train.queue_length, train.queue_fill, device)
        self.encoder = MomentumEncoder(model, train.tap, train.encoder_momentum, device)
        self.exchange = WordExchange(rank, ranks, device)
        self.states: list[Tensor] = []
        """The encoder's, of this rank's micro-batches so far."""

    def begin(self, texts: Sequence[npt.NDArray[Any]], micro: MicroBatchPlan) -> None:
        """Read the queues of the words of this rank's tokens; `texts`: the target words of each block. Collective."""
        words = UpdateWords.of(texts, micro)
        self.words, self.states = words, []
        self.wanted = words.wanted(self.rank)
        rows = self.exchange.fetch(words, self._read)
        self.read = Pull(rows[:, 0], rows[:, 2:], rows[:, 1])

    def target(self, number: int) -> Pull:
        """What the tokens of a micro-batch of this rank are pulled towards. Local."""
        at = torch.from_numpy(np.searchsorted(self.wanted, self.words.of_micro(number))).to(self.read.mean.device)
        return Pull(*(part[at] for part in self.read))

    def encode(self, inputs: Tensor, scored: Tensor | None) -> None:
        """A micro-batch as the encoder sees it; this rank's, in order. Local."""
        self.states.append(self.encoder.states(inputs, scored))

    def end(self, weights: Mapping[str, Tensor]) -> None:
        """The encoder follows the model's new weights, and the states join their words' queues. Collective."""
        self.table.push(*self.exchange.deliver(self.words, torch.cat(self.states)))
        self.encoder.follow(weights)
        self.states = []

    def save(self, folder: Path) -> None:
        """This rank's files of a checkpoint. Local. Raises OSError when the disk is full."""
        save_table(self.table, folder, self.rank, self.ranks)
        if self.rank == 0:
            save_encoder(self.encoder, folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote on any number of ranks. Local. Raises DistlmError as files.py."""
        load_encoder(self.encoder, folder)
        load_table(self.table, folder, self.rank, self.ranks)

    def _read(self, rows: Tensor) -> Tensor:
        """members, spread and mean of rows of this rank's table as one: fp32 [n, 2 + D]."""
        pull = self.table.read(rows)
        return torch.cat([pull.members.float()[:, None], pull.spread[:, None], pull.mean], dim=1)
