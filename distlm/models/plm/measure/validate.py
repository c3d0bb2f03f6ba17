"""Masked-language-model loss on held-out rows with masks fixed by the seed, the same number on any rank count."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distlm.data.shards.reader import ShardRows
from distlm.models.plm.text.masking import NO_LABEL, mask_rows
from distlm.training.engine import Engine, share
from distlm.training.validate import Validation, require_finite_loss

EVALUATION_EPOCH = -1
"""The epoch that keys the masks of evaluation: none of training."""


class PlmValidator:
    """Scores the rows of a split in micro-batches of `batch` rows over all ranks, in the split's order.

    Rows past the end repeat the last one and count for nothing, so every rank makes equally many passes.
    """

    def __init__(self, rows: ShardRows, batch: int, seed: int, share_masked: float) -> None:
        self.rows, self.batch, self.seed, self.share_masked = rows, batch, seed, share_masked
        self.count = len(rows)
        self.rule = f"masked tokens of {self.count} rows of {rows.row_tokens}, masks of seed {seed}"

    def run(self, engine: Engine, rank: int, ranks: int) -> Validation:
        """Collective. Raises Diverged when the loss is not finite."""
        engine.eval()
        sums: list[float] = []
        labels = 0
        for first in range(0, self.count, self.batch):
            total, counted = self._score(engine, first, rank, ranks)
            sums.append(total)
            labels += counted
        engine.train()
        everyone = share([float(labels), *sums])
        total = math.fsum(value for row in everyone for value in row[1:])
        require_finite_loss(total)
        tokens = int(sum(row[0] for row in everyone))
        return Validation(total / max(tokens, 1), tokens, self.rule)

    def _score(self, engine: Engine, first: int, rank: int, ranks: int) -> tuple[float, int]:
        size = self.batch // ranks
        numbers = np.arange(first + rank * size, first + (rank + 1) * size)
        real = numbers < self.count
        numbers = np.minimum(numbers, self.count - 1)
        inputs, labels, text, counted = masked_batch(self.rows, numbers, self.seed, self.share_masked)
        labels[~real] = NO_LABEL
        counted[~real] = False
        with torch.no_grad():
            total = engine.forward(*(tensor.to(engine.device) for tensor in (inputs, labels, text, counted)), None)
        return float(total), int((labels != NO_LABEL).sum())


def masked_batch(rows: ShardRows, numbers: Any, seed: int, mask_share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows `numbers` [B] with the masks of evaluation: inputs and labels int64 [B, T], and bool [B, T] which tokens are
    text (no padding) and which count as use of a memory. The masks are a function of (seed, row)."""
    tokens = rows.rows(numbers)
    masked, labels = mask_rows(tokens, numbers, EVALUATION_EPOCH, seed, rows.tokenizer, mask_share)
    text, counted = rows.is_text(tokens), rows.is_counted(tokens)
    return torch.from_numpy(masked), torch.from_numpy(labels), torch.from_numpy(text), torch.from_numpy(counted)
