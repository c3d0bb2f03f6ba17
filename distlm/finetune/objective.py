"""What fine-tuning minimises: cross-entropy of the label or of both ends of the answer, or the squared error."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distlm.finetune.model import TaskModel
from distlm.training.objective import Objective


class TaskOutput(NamedTuple):
    """Of some rows."""

    losses: Tensor
    """fp32 [B]."""
    scores: Tensor
    """fp32 [B, C], or [B, T, 2] of beginnings and ends."""


class TaskModule(Objective):
    """A model with the loss of its task."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model: TaskModel = model

    def forward(
        self, tokens: Tensor, types: Tensor, text: Tensor, counted: Tensor, keys: Tensor | None, targets: Tensor
    ) -> TaskOutput:
        """tokens, types int64 [B, T], text and counted bool [B, T] (see Rows), keys int64 [B] or None (no dropout);
        targets int64 [B] labels, fp32 [B] numbers, or int64 [B, 2] first and last token of the answer."""
        with self.model.rows.set(keys, text, counted):
            scores = self.model(tokens, types).float()
        head = self.model.config.head
        if head == "number":
            return TaskOutput((scores[:, 0] - targets).square(), scores)
        if head == "labels":
            return TaskOutput(F.cross_entropy(scores, targets, reduction="none"), scores)
        # How far a row is padded must not matter.
        masked = scores.masked_fill(~text[:, :, None], float("-inf"))
        return TaskOutput(F.cross_entropy(masked, targets, reduction="none").mean(1), masked)

    def loss(self, losses: Tensor, scale: float) -> Tensor:
        """fp32 scalar to differentiate: Σ losses · scale."""
        return (losses.sum(dtype=torch.float64) * scale).float()
