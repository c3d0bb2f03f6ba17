"""The objective of a model that predicts the next word and has product-key memories."""

import torch
from torch import Tensor

from distlm.models.language_model import LanguageModel
from distlm.models.row_dropout import Rows, token_keys
from distlm.training.objective import Pull, Sums, TrainModule


class MemoryModule(TrainModule):
    """TrainModule of a model whose `rows` (Rows) say what its memories and its dropout must know of a batch."""

    def forward(
        self, inputs: Tensor, targets: Tensor, scored: Tensor | None = None, pull: Pull | None = None,
        keys: Tensor | None = None,
    ) -> Sums:  # fmt: skip
        """As TrainModule; keys int64 [B]: one number per row and update, from which its dropout follows (None: none).

        In training every token that is no padding is scored, so that `scored` says, too, which tokens the query norm
        pools; in evaluation, where it has running statistics, that reads are counted once.
        """
        rows = self.model.rows
        assert isinstance(rows, Rows)
        tokens = None
        if keys is not None:
            of_tokens = token_keys(keys, inputs.shape[1])
            tokens = of_tokens.reshape(-1) if scored is None else of_tokens[scored]
        mask = torch.ones_like(inputs, dtype=torch.bool) if scored is None else scored
        with rows.set(keys, mask, mask, tokens):
            return super().forward(inputs, targets, scored, pull)


def objective_of(model: LanguageModel, tap: str, weight: float = 0.0, reduction: str = "mean") -> TrainModule:
    """The objective of a model that predicts the next word, with or without memories; see TrainModule."""
    found = MemoryModule if getattr(model, "memories", None) else TrainModule
    return found(model, tap, weight, reduction)
