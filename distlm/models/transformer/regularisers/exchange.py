"""Which rank has a word's queue, which words an update asks for, and what the ranks send each other for it.

Word w is row w // R of rank w mod R of R: frequent words, whose ids are small, are dealt evenly. Every rank
knows beforehand which words an update trains on, and so what it must send to which rank: none has to ask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from distlm.training.microbatch import MicroBatchPlan

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class UpdateWords:
    """The target words of one update, over all ranks."""

    words: Ints
    """int64 [N], in the order of blocks and tokens."""
    micro: Ints
    """int64 [N]: the micro-batch that each is in, rising."""
    ranks: int

    @staticmethod
    def of(targets: Sequence[npt.NDArray[np.integer]], plan: MicroBatchPlan) -> "UpdateWords":
        """targets: the tokens of each block of the update, in order."""
        block = np.repeat(np.arange(len(targets)), [len(words) for words in targets])
        return UpdateWords(np.concatenate(targets).astype(np.int64), block // plan.micro_blocks, plan.ranks)

    def of_micro(self, number: int) -> Ints:
        """The words of a micro-batch, in order."""
        first, last = np.searchsorted(self.micro, [number, number + 1])
        return self.words[first:last]

    def at(self, rank: int) -> Ints:
        """Places of the tokens that a rank trains on, in its order, which is rising: int64."""
        return np.flatnonzero(self.micro % self.ranks == rank)

    def wanted(self, rank: int) -> Ints:
        """The words whose queues a rank reads, rising, each once."""
        return np.unique(self.words[self.at(rank)])


class WordExchange:
    """Rows about words, between the ranks that train on them and the ranks that keep them."""

    def __init__(self, rank: int, ranks: int, device: torch.device) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device

    def fetch(self, words: UpdateWords, read: Callable[[Tensor], Tensor]) -> Tensor:
        """The rows of `words.wanted(this rank)`: fp32 [n, W]. Collective.

        read: rows of this rank's words (int64 [m], as rows of its table) → fp32 [m, W].
        """
        wanted = [words.wanted(rank) for rank in range(self.ranks)]
        send = [read(self._rows(mine[mine % self.ranks == self.rank])) for mine in wanted]
        own = wanted[self.rank]
        places = [np.flatnonzero(own % self.ranks == owner) for owner in range(self.ranks)]
        received = self._all_to_all(send, [len(at) for at in places])
        rows = received[0].new_empty(len(own), received[0].shape[1])
        for at, part in zip(places, received, strict=True):
            rows[self._tensor(at)] = part
        return rows

    def deliver(self, words: UpdateWords, states: Tensor) -> tuple[Tensor, Tensor]:
        """States of this rank's tokens, fp32 [n, D] → those of all tokens whose word this rank keeps, in global order:
        rows of its table (int64 [m]) and states [m, D]. Collective."""
        own = words.words[words.at(self.rank)]
        send = [states[self._tensor(np.flatnonzero(own % self.ranks == owner))] for owner in range(self.ranks)]
        kept = np.flatnonzero(words.words % self.ranks == self.rank)
        places = [at[words.words[at] % self.ranks == self.rank] for at in map(words.at, range(self.ranks))]
        received = torch.cat(self._all_to_all(send, [len(at) for at in places]))
        order = np.argsort(np.concatenate(places), kind="stable")
        return self._rows(words.words[kept]), received[self._tensor(order)]

    def _rows(self, words: Ints) -> Tensor:
        return self._tensor(words // self.ranks)

    def _tensor(self, array: Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _all_to_all(self, send: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Part r goes to rank r, and of rank r come `sizes[r]` rows."""
        if self.ranks == 1:
            return list(send)
        given = torch.cat(list(send)).contiguous()
        received = given.new_empty(sum(sizes), given.shape[1])
        dist.all_to_all_single(received, given, list(sizes), [len(part) for part in send])
        return list(received.split(list(sizes)))
