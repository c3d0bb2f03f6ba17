"""Which slots of a memory are read, how often and when last: counters that training updates as it reads."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distlm.memory import measures
from distlm.memory.records import MemoryUse
from distlm.memory.values.exchange import Exchange


@dataclass(frozen=True)
class UsageCounts:
    """Counters of the K slots of one memory, tensors [K].

    A read is one (token, head, place) with a weight above 0; the top-1 read of a (token, head) is the one of highest
    score. Updates count from 1; 0: never.
    """

    reads: Tensor
    """int64: reads (u')."""
    top1: Tensor
    """int64: top-1 reads (t')."""
    weights: Tensor
    """fp64: sum of the weights (w')."""
    last_read: Tensor
    """int32: last update that read the slot."""
    last_top1: Tensor
    """int32: last update that read it as top-1."""

    @staticmethod
    def total(parts: "Sequence[UsageCounts]") -> "UsageCounts":
        """The counters of several readers together."""
        sums = {
            name: torch.stack([getattr(part, name) for part in parts]).sum(0) for name in ("reads", "top1", "weights")
        }
        last = {
            name: torch.stack([getattr(part, name) for part in parts]).amax(0) for name in ("last_read", "last_top1")
        }
        return UsageCounts(**sums, **last)

    def measures(self) -> MemoryUse:
        """How the slots are used; NaN where there is no number."""
        return MemoryUse(
            mu=measures.used_share(self.reads),
            top1_mu=measures.used_share(self.top1),
            kl_u=measures.divergence_from_uniform(self.reads),
            kl_w=measures.divergence_from_uniform(self.weights),
            gini=measures.gini(self.weights),
        )

    def stale_share(self, update: int) -> float:
        """Share of the slots whose last top-1 read, if any, is not among the latest fifth of updates 1 … `update`: all
        but the newest of the groups in Kim & Jung's figure 2."""
        return 1 - measures.used_share(self.last_top1 > update - max(1, update // 5))


class Usage:
    """Counters of one rank for one memory. They are no part of the module: no cast and no ZeRO reaches them.

    `reads`, `top1` and `weights` count since `reset` (one log interval); the last updates are kept for ever.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        # One more than there are slots: reads that do not count go there, for want of a mask that costs no wait.
        self._counters = UsageCounts(
            reads=torch.zeros(slots + 1, dtype=torch.int64),
            top1=torch.zeros(slots + 1, dtype=torch.int64),
            weights=torch.zeros(slots + 1, dtype=torch.float64),
            last_read=torch.zeros(slots + 1, dtype=torch.int32),
            last_top1=torch.zeros(slots + 1, dtype=torch.int32),
        )

    @torch.no_grad()
    def add(self, slots: Tensor, weights: Tensor, counted: Tensor, update: int) -> None:
        """Count the reads of T tokens: slots int [T, H, k], weights [T, H, k] falling along k, counted bool [T].

        `update` is the number of the update under way. Costs about 20 ns a read on one CPU core.
        """
        self._move(slots.device)
        counters = self._counters
        real = counted[:, None, None] & (weights > 0)
        read = torch.where(real, slots, self.slots).long()
        best, read = read[:, :, 0].flatten(), read.flatten()
        one = torch.ones(1, dtype=torch.int64, device=slots.device)
        counters.reads.index_add_(0, read, one.expand(len(read)))
        counters.top1.index_add_(0, best, one.expand(len(best)))
        counters.weights.index_add_(0, read, weights.flatten().double())
        counters.last_read.index_fill_(0, read, update)
        counters.last_top1.index_fill_(0, best, update)

    def reset(self) -> None:
        """A new interval: reads, top-1 reads and weights from 0."""
        for tensor in (self._counters.reads, self._counters.top1, self._counters.weights):
            tensor.zero_()

    def counts(self) -> UsageCounts:
        """Copies of this rank's counters, [K] each."""
        return UsageCounts(**{name: tensor[:-1].clone() for name, tensor in self._tensors().items()})

    def reduced(self, exchange: Exchange) -> UsageCounts:
        """The counters of all ranks together, on each of them: sums, and the latest updates. Collective."""
        mine = self.counts()
        return UsageCounts(
            reads=exchange.sum(mine.reads.double(), "usage").long(),
            top1=exchange.sum(mine.top1.double(), "usage").long(),
            weights=exchange.sum(mine.weights, "usage"),
            last_read=exchange.maximum(mine.last_read, "usage"),
            last_top1=exchange.maximum(mine.last_top1, "usage"),
        )

    def load(self, counts: UsageCounts, first_rank: bool) -> None:
        """Continue from `reduced` counters. The sums go on on one rank (`first_rank`), or they would count R times."""
        for name, tensor in self._tensors().items():
            given = getattr(counts, name)
            if given.shape != (self.slots,):
                raise ValueError(f"{name} has the shape {tuple(given.shape)}, not {(self.slots,)}")
            tensor[:-1] = given.to(tensor.device)
        if not first_rank:
            self.reset()

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self._counters, field.name) for field in fields(self._counters)}

    def _move(self, device: torch.device) -> None:
        if self._counters.reads.device != device:
            self._counters = UsageCounts(**{name: tensor.to(device) for name, tensor in self._tensors().items()})
