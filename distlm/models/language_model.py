"""What datastore, search and evaluation ask of a language model, whatever its kind."""

from abc import abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn


class LMOutput(NamedTuple):
    """hidden: output before the softmax [B, T, D], None when the pass stopped at the tap. tapped: [B, T, D] or None."""

    hidden: Tensor | None
    tapped: Tensor | None


class LanguageModel(nn.Module):
    """A causal language model over the words of a dictionary."""

    width: int
    """D of `hidden` and of the taps."""
    vocabulary: int
    """V: words of the dictionary, specials included."""
    begins = False
    """Each block is given with Dictionary.BOS in front (data.blocks.gather)."""
    state_width = 0
    """S: numbers of the state that a recurrent model carries from token to token. 0: it has none; else `forward` takes
    the states before the rows as `before`, fp32 [B, S]."""

    @abstractmethod
    def forward(self, inputs: Tensor, tap: str | None = None, stop_at_tap: bool = False) -> LMOutput:
        """inputs int64 [B, T], right-padded → states of every position, both [B, T, D]."""

    def new_past(self) -> Any:
        """What the passes over one growing text keep, e.g. keys and values of attention: handed to `forward` as `past`
        with the tokens that are new, it gives their states. None: every pass has to begin anew, and takes no `past`."""
        return None

    def read(self, words: Tensor, before: Tensor) -> Tensor:
        """words int64 [T] after a state fp32 [S] → the state after the last of them, fp32 [S]."""
        raise NotImplementedError(f"{type(self).__name__} carries no state")

    @abstractmethod
    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden [n, D], targets int64 [n] → log p(target), fp32 [n]."""

    @abstractmethod
    def full_log_probs(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] → log-probabilities of every word, fp32 [n, V]; for tests and small vocabularies."""
