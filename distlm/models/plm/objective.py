"""What a masked language model minimises."""

from torch import Tensor

from distlm.models.plm.model import Plm
from distlm.training.objective import Objective


class MaskedModule(Objective):
    """The masked language model's objective: mean CE over the tokens that are predicted."""

    def __init__(self, model: Plm) -> None:
        super().__init__()
        self.model: Plm = model

    def forward(self, tokens: Tensor, labels: Tensor, mask: Tensor, counted: Tensor, keys: Tensor | None) -> Tensor:
        """Σ CE over the labelled positions: fp64 scalar.

        tokens, labels int64 [B, T] (labels NO_LABEL elsewhere), mask and counted bool [B, T], keys int64 [B]: see Rows.
        """
        with self.model.rows.set(keys, mask, counted):
            return self.model.loss_sum(self.model(tokens), labels)

    def loss(self, total: Tensor, scale: float) -> Tensor:
        """fp32 scalar to differentiate: Σ CE · scale."""
        return (total * scale).float()
