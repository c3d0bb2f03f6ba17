"""Validation loss in training-length windows, the same number on any rank count."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from distlm.config.training import BlocksConfig
from distlm.data.blocks import BEGINS, Blocks, eval_blocks, gather
from distlm.data.tokens import TokenFiles
from distlm.errors import Diverged
from distlm.runtime import metrics
from distlm.training.engine import Engine, share
from distlm.training.objective import Sums


@dataclass(frozen=True)
class Validation:
    """Mean over every token of the split, `</s>` and `<unk>` counted."""

    loss: float
    """Nats per token."""
    tokens: int
    rule: str
    """Which context each token had."""
    words: int = field(default=0, kw_only=True)
    """Words of the text, where tokens are sub-words; 0: its tokens."""

    @property
    def perplexity(self) -> float:
        """exp(Σ loss / words), per word; inf where that overflows."""
        return _exp(self.loss * self.tokens / (self.words or self.tokens))

    @property
    def text(self) -> str:
        """For people."""
        per_token = f" per word, {_exp(self.loss):.2f} per token" if self.words else " per word"
        return f"valid loss {self.loss:.4f}, ppl {self.perplexity:.2f}{per_token} ({self.rule})"

    @property
    def values(self) -> metrics.Values:
        """For metrics.jsonl."""
        return {metrics.VALID_LOSS: self.loss, metrics.VALID_PPL: self.perplexity, "valid/context": self.rule}

    @property
    def last(self) -> dict[str, float]:
        """For the summary of a run."""
        return {"valid_loss": self.loss, "valid_ppl": self.perplexity}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def require_finite_loss(loss: float) -> None:
    """Raises Diverged unless a validation loss, which is the same on every rank, is finite."""
    if not math.isfinite(loss):
        raise Diverged(f"the validation loss is {loss}")


class Validator:
    """Scores a split in batches of blocks: whole lines packed, each block with the tokens before it as context."""

    def __init__(
        self, tokens: TokenFiles, split: str, context: int, block: int, batch_blocks: int, begins: bool = False,
        even: bool = False,
    ) -> None:  # fmt: skip
        """Blocks of at most `block` tokens after up to `context` tokens; `batch_blocks` of them go through the model at
        once (it does not change the result of a block, but the batches, not the ranks, decide the order of summation).
        `begins`: the model's. With `even` all ranks are given equally many tokens at a time, for a model with
        collectives in its forward.
        """
        self.begins, self.even = begins, even
        self.ids, self.batch_blocks, self.vocabulary = tokens.split(split), batch_blocks, len(tokens.dictionary)
        self.words = tokens.words(split) if tokens.tokenizer else 0
        self.blocks: Blocks = eval_blocks(self.ids, context, block)
        self.rule = f"blocks of {block} with up to {context} tokens of context{BEGINS if begins else ''}"

    @classmethod
    def in_training(
        cls, tokens: TokenFiles, train: BlocksConfig, begins: bool = False, even: bool = False
    ) -> "Validator":
        """Of the valid split, dealt to the ranks round robin: half the training length, with the other half as context,
        so that no position is beyond those trained."""
        context = train.tokens_per_sample // 2
        return cls(tokens, "valid", context, train.tokens_per_sample - context, train.micro_blocks, begins, even)

    def run(self, engine: Engine, rank: int, ranks: int) -> Validation:
        """Collective. Raises Diverged when the loss is not finite."""
        batches = self._batches
        engine.eval()
        sums = []
        for first in range(0, batches, ranks):
            # ZeRO 3 gathers weights in every forward, so a rank without a batch repeats one and drops its sum.
            number = first + rank
            round_of = range(first, min(first + ranks, batches)) if self.even else ()
            total = self._score(engine.forward, engine.device, number if number < batches else first, round_of)
            sums.append(total if number < batches else 0.0)
        engine.train()
        everyone = share(sums)
        # In the plan's order, so that the rounding does not depend on the rank count.
        return self._mean(math.fsum(everyone[number % ranks][number // ranks] for number in range(batches)))

    def run_alone(self, objective: Callable[..., Sums], device: torch.device) -> Validation:
        """The same number from an objective in eval mode on this process, without an engine."""
        return self._mean(math.fsum(self._score(objective, device, number) for number in range(self._batches)))

    def _indices(self, number: int) -> npt.NDArray[np.int64]:
        return np.arange(number * self.batch_blocks, min((number + 1) * self.batch_blocks, len(self.blocks)))

    @property
    def _lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each block, context included."""
        return self.blocks.end - self.blocks.context_start

    @property
    def _batches(self) -> int:
        return math.ceil(len(self.blocks) / self.batch_blocks)

    def _mean(self, total: float) -> Validation:
        require_finite_loss(total)
        tokens = int(self.blocks.scored.sum())
        return Validation(total / tokens, tokens, self.rule, words=self.words)

    def _score(
        self, forward: Callable[..., Sums], device: torch.device, number: int, round_of: Sequence[int] = ()
    ) -> float:
        """Σ nats of a batch; its shape is the largest of those of `round_of`."""
        indices = self._indices(number)
        others = [self._indices(other) for other in round_of]
        longest = max((int(self._lengths[other].max()) for other in others), default=0)
        missing = max((len(other) for other in others), default=0) - len(indices)
        if missing > 0:
            indices = np.concatenate([indices, np.repeat(indices[-1:], missing)])
        batch = gather(self.ids, self.blocks, indices, begins=self.begins, least=longest, vocabulary=self.vocabulary)
        if missing > 0:
            batch.scored[-missing:] = False
        arrays = (torch.from_numpy(array).to(device) for array in (batch.inputs, batch.targets, batch.scored))
        with torch.no_grad():
            return float(forward(*arrays).ce)
