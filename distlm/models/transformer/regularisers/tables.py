"""The recent states of words: explicit queues, or means that forget at the rate at which queues do.

Both are read as members, mean and spread, which is all that eq. 1 needs (penalty.py). As long as no more than `length`
states of a word came, the two hold the same members; after that a queue has the last `length` of them with equal
weights, and a running mean all of them, each worth 1 − 1/length of the next.

Everything is fp32, whatever the precision of training, and a function of the sequence of states of each word alone:
how the words are dealt to ranks, and the tokens to micro-batches, changes nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from distlm.models.transformer.config import TransformerTraining
from distlm.models.transformer.regularisers.penalty import Pull

_READ = 1 << 24
"""Numbers of explicit queues that are summed at once."""


class WordTable(ABC):
    """Recent states of `words` words, width D = `width`; words are rows 0, 1, …"""

    pushed: Tensor
    """int64 [words]: states that ever came."""

    def __init__(self, words: int, width: int, length: int, fill: int, device: torch.device) -> None:
        """length: L. fill: a word with fewer members pulls nothing."""
        self.width, self.length, self.fill = width, length, fill
        self.pushed = torch.zeros(words, dtype=torch.int64, device=device)

    def read(self, words: Tensor) -> Pull:
        """members [n], mean [n, D] and spread [n] of some words, int64 [n]."""
        members = self.pushed[words].clamp(max=self.length)
        counts = members >= self.fill
        mean, spread = self._moments(words, members)
        return Pull(members * counts, mean, spread * counts)

    @torch.no_grad()
    def push(self, words: Tensor, states: Tensor) -> None:
        """States [n, D] of the words [n], int64, the oldest first; a word may come several times."""
        if not len(words):
            return
        order = torch.argsort(words, stable=True)
        found, group, sizes = torch.unique_consecutive(words[order], return_inverse=True, return_counts=True)
        place = torch.arange(len(words), device=words.device) - (sizes.cumsum(0) - sizes)[group]
        self._take(states[order].float(), _Groups(found, group, sizes, place))
        self.pushed[found] += sizes

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Name → what a checkpoint keeps, word by word: [words, …]."""

    @abstractmethod
    def _moments(self, words: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [n, D] and spread [n]."""

    @abstractmethod
    def _take(self, states: Tensor, groups: "_Groups") -> None:
        """Take states [n, D], grouped by word."""


class _Groups(NamedTuple):
    """n states sorted by word, those of a word oldest first."""

    words: Tensor
    """int64 [g]: the words."""
    group: Tensor
    """int64 [n]: which of them a state is of."""
    sizes: Tensor
    """int64 [g]: states of each."""
    place: Tensor
    """int64 [n]: number of a state among those of its word, from 0."""


class WordQueues(WordTable):
    """The last `length` states of every word: words · L · D · 4 bytes."""

    def __init__(self, words: int, width: int, length: int, fill: int, device: torch.device) -> None:
        super().__init__(words, width, length, fill, device)
        self.queues = torch.zeros(words, length, width, device=device)
        """[words, L, D]; state number i of a word is in slot i mod L."""

    def tensors(self) -> dict[str, Tensor]:
        return {"pushed": self.pushed, "queues": self.queues}

    def _moments(self, words: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.queues.new_empty(len(words), self.width)
        spread = self.queues.new_empty(len(words))
        step = max(1, _READ // (self.length * self.width))
        for first in range(0, len(words), step):
            rows = slice(first, first + step)
            held, count = self.queues[words[rows]], members[rows].clamp(min=1)
            # Slots that no state has come to yet hold zeros.
            mean[rows] = held.sum(1) / count[:, None]
            there = torch.arange(self.length, device=held.device) < members[rows][:, None]
            spread[rows] = ((held - mean[rows][:, None]).square().sum(-1) * there).sum(1)
        return mean, spread

    def _take(self, states: Tensor, groups: _Groups) -> None:
        slots = (self.pushed[groups.words][groups.group] + groups.place) % self.length
        # Where more states came than a queue holds, only the last ones go in: each slot is written once.
        last = groups.place >= groups.sizes[groups.group] - self.length
        self.queues[groups.words[groups.group][last], slots[last]] = states[last]


class RunningMeans(WordTable):
    """Mean and variance of every word's states: words · (D + 1) · 4 bytes.

    State number i moves the mean by 1 / min(i, L) of its distance: the mean of all while there are at most L, an
    exponential moving average after that.
    """

    def __init__(self, words: int, width: int, length: int, fill: int, device: torch.device) -> None:
        super().__init__(words, width, length, fill, device)
        self.mean = torch.zeros(words, width, device=device)
        self.variance = torch.zeros(words, device=device)
        """Mean of ‖Q_i − Q̄‖² over the members: [words]."""

    def tensors(self) -> dict[str, Tensor]:
        return {"pushed": self.pushed, "mean": self.mean, "variance": self.variance}

    def _moments(self, words: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean[words], self.variance[words] * members

    def _take(self, states: Tensor, groups: _Groups) -> None:
        """All states of a word at once, with the weights that one after the other would have given them."""
        before = self.pushed[groups.words].clamp(max=self.length)
        after = (before + groups.sizes).clamp(max=self.length)
        # While a word is filling its states weigh the same; each state after that shrinks the weights before it.
        filling = self.length - before
        later = groups.sizes[groups.group] - torch.maximum(groups.place + 1, filling[groups.group])
        keep = torch.tensor(1 - 1 / self.length, dtype=torch.float64, device=states.device)
        weights = (keep ** later.clamp(min=0) / after[groups.group]).float()
        old = (before / after * keep ** (groups.sizes - filling).clamp(min=0)).float()
        mean = old[:, None] * self.mean[groups.words]
        mean.index_add_(0, groups.group, weights[:, None] * states)
        moved = (self.mean[groups.words] - mean).square().sum(-1)
        variance = old * (self.variance[groups.words] + moved)
        variance.index_add_(0, groups.group, weights * (states - mean[groups.group]).square().sum(-1))
        self.mean[groups.words], self.variance[groups.words] = mean, variance


TABLES: Mapping[str, type[WordTable]] = {"queue": WordQueues, "mean": RunningMeans}
"""Value of train.regulariser → its table."""


def uses_queues(train: TransformerTraining) -> bool:
    """Whether training has queues and a momentum encoder: with ω = 0 there is neither."""
    return train.regulariser != "l2" and train.l2_weight > 0


def table_bytes(kind: str, words: int, width: int, length: int, ranks: int) -> int:
    """Bytes of one rank's table, counts of states included."""
    numbers = length * width if kind == "queue" else width + 1
    return -(-words // ranks) * (4 * numbers + 8)
