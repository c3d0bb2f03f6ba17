"""The gradient of a table's values: kept as what it is made of until the update, then summed slot by slot."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distlm.memory.lookup import bag_sums
from distlm.memory.values import kernels
from distlm.memory.values.exchange import Exchange


@dataclass(frozen=True)
class SlotSums:
    """Gradient of the values: row `rows[u]` has Σ weights[e]·source[index[e]], e from offsets[u] to offsets[u + 1].

    rows int64 [U] rising; source fp32 [N, d]; index int32 [n], weights fp32 [n]; offsets int32 [U + 1]. The same bag
    sums as the forward's, tokens and slots having changed places.
    """

    rows: Tensor
    source: Tensor
    index: Tensor
    weights: Tensor
    offsets: Tensor

    def of_all(self, slots: int) -> "SlotSums":
        """The same with a row for each of K slots, empty where nobody read it."""
        offsets = torch.zeros(slots + 1, dtype=torch.int32, device=self.rows.device)
        offsets[self.rows + 1] = self.offsets.diff()
        every = torch.arange(slots, device=self.rows.device)
        return SlotSums(every, self.source, self.index, self.weights, offsets.cumsum_(0))

    def whole(self) -> Tensor:
        """fp32 [U, d]."""
        return self._sum(self.index, self.offsets, self.weights)

    def _sum(self, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        # Sums that are taken early, those of the norm and those of the update must round alike.
        sums = kernels.bag_sums if kernels.usable(self.source.device) else bag_sums
        return sums(self.source, index, offsets, weights)

    def by_pieces(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(slots int64 [c], gradient fp32 [size, d]) for c = size slots at a time; at the end fewer, and zero rows."""
        count = len(self.rows) // size + 1
        padding = count * size - len(self.rows)
        offsets = torch.nn.functional.pad(self.offsets, (0, padding), value=len(self.index)).unfold(0, size + 1, size)
        starts = offsets[:, :1]
        ends = [*starts.flatten().tolist(), len(self.index)]
        lengths = [end - begin for begin, end in pairwise(ends)]
        parts = (
            self.rows.split(size),
            self.index.split(lengths),
            self.weights.split(lengths),
            (offsets - starts).unbind(),
        )
        for rows, index, weights, bags in zip(*parts, strict=False):
            yield rows, self._sum(index, bags, weights)


class ValueGradient:
    """Σ over tokens of weight·(gradient of the memory's output), per slot, for this rank's columns.

    Each micro-batch adds (slots, weights, output gradient): T·P·(8·A + d·b) bytes for T tokens a rank, A reads a token
    and d = D/P columns of b bytes. Every slot's sum is taken in the order of micro-batches, tokens (of all ranks) and
    reads, in fp32, from 0: the same bits for any number of ranks, columns and replicas.

    When what is kept would outgrow a gradient of all K slots (4·K·d bytes), it is summed: then U·d·4 bytes remain for
    the U slots read so far (while they are summed, three times that). The sums go on from there, so that nobody can
    tell from the result when that happened.
    """

    def __init__(self, slots: int, width: int, exchange: Exchange) -> None:
        """slots: K; width: columns d of this rank."""
        self.limit = 4 * slots * width
        """Bytes kept (of all replicas) at which they are summed; the same on all ranks."""
        self._exchange = exchange
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sums: tuple[Tensor, Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for part in self._parts for x in part) + sum(x.nbytes for x in self._sums or ())

    def add(self, slots: Tensor, weights: Tensor, gradient: Tensor) -> None:
        """One micro-batch of a column group: slots int32 [N, A], weights fp32 [N, A], gradient [N, d] of any precision.

        Collective over the replicas whenever the limit is reached.
        """
        self._parts.append((slots, weights, gradient))
        if sum(x.nbytes for part in self._parts for x in part) * self._exchange.replicas >= self.limit:
            merged = self._merge()
            self._sums = merged.rows, merged.whole()

    def not_finite(self) -> Tensor:
        """fp64 []: above 0 if anything held here is infinite or NaN. Local."""
        held = [x for part in self._parts for x in part[1:]] + ([self._sums[1]] if self._sums else [])
        # NaN is the least and the largest of any tensor that has it.
        ends = [torch.stack(x.aminmax()).float() for x in held if x.numel()]
        return torch.cat(ends).isfinite().logical_not_().sum(dtype=torch.float64) if ends else torch.zeros(()).double()

    def take(self) -> SlotSums | None:
        """What was added, as sums; None when there was nothing. Nothing is held afterwards. Collective."""
        return self._merge() if self._parts or self._sums else None

    def clear(self) -> None:
        """Forget everything. Local."""
        self._parts.clear()
        self._sums = None

    def _merge(self) -> SlotSums:
        gather = self._exchange.gather_replicas
        parts = [tuple(gather(x, "stash") for x in part) for part in self._parts]
        sums = self._sums
        self.clear()
        slots = [part[0].flatten() for part in parts]
        weights = [part[1].flatten() for part in parts]
        sources = [part[2].float() for part in parts]
        reads = parts[0][0].shape[1] if parts else 1
        before = 0
        if sums is not None:
            # A slot's earlier sum is its first entry, times 1: 0 + 1·sum is exact.
            before = len(sums[0])
            slots.insert(0, sums[0].int())
            weights.insert(0, torch.ones(before, device=sums[1].device))
            sources.append(sums[1])
        tokens = sum(len(part[2]) for part in parts)
        del parts, sums
        source = sources[0] if len(sources) == 1 else torch.cat(sources)
        del sources
        rising, order = torch.cat(slots).sort(stable=True)
        del slots
        rows, counts = rising.unique_consecutive(return_counts=True)
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int32, device=rows.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        ordered = torch.cat(weights)[order]
        # Entry `before + e` is a read of token e // reads; the earlier sums stand behind the tokens.
        index = torch.where(order < before, order + tokens, (order - before).div(reads, rounding_mode="floor")).int()
        return SlotSums(rows.long(), source, index, ordered, offsets)
