"""The gradient of a table's values: kept as its summands until the update, then summed slot by slot."""

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
        loops = kernels.loops_of(self.source.device)
        return (loops.bag_sums if loops else bag_sums)(self.source, index, offsets, weights)

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

    `factor`, fp32 [], stands for all of it in the groups of a torch optimizer, where a gradient of K slots would have
    to stand otherwise. Its `.grad` is None until something was added. Then it is the number that all of it is still to
    be multiplied with: 1, or NaN when some of it is infinite or NaN. A GradScaler looks for that, and divides it by its
    scale, as with every other gradient.
    """

    def __init__(self, slots: int, width: int, exchange: Exchange) -> None:
        """slots: K; width: columns d of this rank."""
        self.limit = 4 * slots * width
        """Bytes kept (of all replicas) at which they are summed; the same on all ranks."""
        self.agree = False
        """Every `add` tells all ranks whether what was added is finite (one number), so that a GradScaler, which asks
        its own rank alone, is told the same on each."""
        self.factor = torch.zeros(())
        self._exchange = exchange
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sums: tuple[Tensor, Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for part in self._parts for x in part) + sum(x.nbytes for x in self._sums or ())

    @property
    def empty(self) -> bool:
        """Nothing was added since it was last taken."""
        return not self._parts and self._sums is None

    def add(self, slots: Tensor, weights: Tensor, gradient: Tensor) -> None:
        """One micro-batch of a column group: slots int32 [N, A], weights fp32 [N, A], gradient [N, d] of any precision.

        Collective over the replicas whenever the limit is reached, and over all ranks with `agree`.
        """
        self._parts.append((slots, weights, gradient))
        self._mark(weights, gradient)
        if sum(x.nbytes for part in self._parts for x in part) * self._exchange.replicas >= self.limit:
            merged = self._merge()
            factor = self.factor.grad
            self._sums = merged.rows, merged.whole()
            self.factor.grad = factor
            self._mark(self._sums[1])

    def _mark(self, *added: Tensor) -> None:
        """`factor` for what was added."""
        # NaN is the least and the largest of any tensor that has it.
        ends = [torch.stack(x.aminmax()).float() for x in added if x.numel()]
        wrong = torch.cat(ends).isfinite().logical_not_().any() if ends else torch.zeros((), dtype=torch.bool)
        if self.agree:
            wrong = self._exchange.sum(wrong.double(), "finite") > 0
        before = torch.ones_like(self.factor) if self.factor.grad is None else self.factor.grad
        self.factor.grad = torch.where(wrong.to(before.device), torch.nan, before)

    def not_finite(self) -> Tensor:
        """fp64 []: 1 if anything held here is infinite or NaN, else 0. Local."""
        mark = self.factor.grad
        return torch.zeros(()).double() if mark is None else mark.isfinite().logical_not_().double()

    def to(self, device: torch.device) -> None:
        """Move what is held. Local."""
        self._parts = [(s.to(device), w.to(device), g.to(device)) for s, w, g in self._parts]
        self._sums = None if self._sums is None else (self._sums[0].to(device), self._sums[1].to(device))
        mark = self.factor.grad
        self.factor.grad = None
        try:
            # The same tensor, as with parameters: an optimizer has it.
            self.factor.data = self.factor.data.to(device)
        except RuntimeError:  # To or from the device meta, where torch makes new parameters, too.
            self.factor = torch.zeros((), device=device)
        self.factor.grad = None if mark is None else mark.to(device)

    def __getstate__(self) -> dict[str, object]:
        # Like a parameter's copy, which has no gradient.
        return {**self.__dict__, "_parts": [], "_sums": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.factor.grad = None

    def take(self) -> SlotSums | None:
        """What was added, as sums; None when nothing was read. Nothing is held afterwards. Collective."""
        found = None if self.empty else self._merge()
        return found if found is not None and len(found.rows) else None

    def clear(self) -> None:
        """Forget everything. Local."""
        self._parts.clear()
        self._sums = None
        self.factor.grad = None

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
