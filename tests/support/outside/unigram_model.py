"""The module of the unigram language model."""

import torch
from torch import Tensor, nn
from unigram_lm import UnigramConfig

from distlm.models.language_model import LanguageModel, LMOutput


class UnigramLM(LanguageModel):
    """log p(w) = log_softmax(bias)[w]; the hidden state of a position is the vector of its word."""

    def __init__(self, config: UnigramConfig, vocabulary: int) -> None:
        super().__init__()
        self.config, self.vocabulary, self.width = config, vocabulary, config.width
        self.vectors = nn.Embedding(vocabulary, config.width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, inputs: Tensor, tap: str | None = None, stop_at_tap: bool = False) -> LMOutput:
        hidden = self.vectors(inputs)
        return LMOutput(None if stop_at_tap else hidden, None if tap is None else hidden)

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.full_log_probs(hidden)[torch.arange(len(targets), device=targets.device), targets]

    def full_log_probs(self, hidden: Tensor) -> Tensor:
        # The vectors are parameters, so they must be in the graph.
        return (self.bias + 0 * hidden.sum(1, keepdim=True)).log_softmax(1, dtype=torch.float32)
