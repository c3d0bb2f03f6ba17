"""What the ranks of a product-key memory send each other, and how many bytes of it."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distlm.errors import UsageError
from distlm.runtime.ranks.rendezvous import WAIT

# Torch 2.13 has renamed it, and warns whoever uses the other name.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

SMALL = 4096
"""Numbers that `Exchange.sum` sends in one collective."""


class Exchange:
    """The collectives of a memory on R ranks: column groups of P neighbouring ranks, R/P replicas of them.

    Each column group has one copy of the values, cut by columns: its rank `column` has columns column·D/P up to
    (column + 1)·D/P of every slot. P = 1 is a full copy on every rank, P = R one copy in all. The ranks with equal
    `column` of all replicas form a replica group.

    Every method is collective: all ranks (of the group) call it in the same order with the same shape and dtype. What
    is summed is summed here, in rank order, so that no library's choice of algorithm decides about rounding.

    A deep copy is the same object: a copied module sends over the same groups. Pickled, it remembers its place among
    the ranks, and unpickled it wants that place (collective, as to make one).
    """

    def __init__(self, columns: int = 0) -> None:
        """Make the groups. Collective over all ranks; torch.distributed is initialised before (else: one rank).

        columns: P; 0: R. Raises DistlmError when P does not divide R.
        """
        joined = dist.is_available() and dist.is_initialized()
        self._early = not joined
        self.size: int = dist.get_world_size() if joined else 1
        """Ranks R."""
        self.rank: int = dist.get_rank() if joined else 0
        """This rank, 0 to R − 1."""
        self.columns = columns or self.size
        """Ranks P of a column group."""
        if self.columns < 0 or self.size % self.columns:
            raise UsageError(
                f"memory.columns={columns} does not divide the number of ranks, {self.size}; set it to a divisor, or "
                "to 0 for all ranks"
            )
        self.column = self.rank % self.columns
        """Place of this rank in its column group, 0 to P − 1."""
        self.replicas = self.size // self.columns
        """Number of column groups R/P."""
        self.replica = self.rank // self.columns
        """Which column group this rank belongs to, 0 to R/P − 1."""
        self._counts: Counter[str] = Counter()
        self._column_group, self._replica_group = self._make_groups()

    @classmethod
    def alone(cls) -> "Exchange":
        """One rank that has all columns and sends nothing, whatever torch.distributed is doing."""
        exchange = cls.__new__(cls)
        exchange._early = False
        exchange.size = exchange.columns = exchange.replicas = 1
        exchange.rank = exchange.column = exchange.replica = 0
        exchange._counts = Counter()
        exchange._column_group = exchange._replica_group = None
        return exchange

    def check_world(self) -> None:
        """Raises UsageError when torch.distributed has begun with several ranks after this was made for one. Local."""
        if self._early and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise UsageError(
                f"the memory was built before torch.distributed was initialised with {dist.get_world_size()} ranks, "
                "which would each train values of their own; call init_process_group (or deepspeed.init_distributed) "
                "first and build the model after it, or pass exchange=Exchange.alone() if that is what you want"
            )

    def of_rank_0(self, number: int) -> int:
        """The number that rank 0 passes, on every rank."""
        if self.size == 1:
            return number
        # As an object: torch puts it on whatever device the backend sends from.
        numbers = [number]
        dist.broadcast_object_list(numbers, src=0)
        return numbers[0]

    def __deepcopy__(self, memo: object) -> "Exchange":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rejoin, (self.size, self.rank, self.columns, self._early)

    @property
    def bytes(self) -> dict[str, int]:
        """What was sent → bytes that this rank has sent to others since `reset`. Local."""
        return dict(self._counts)

    def reset(self) -> None:
        """Count from zero. Local."""
        self._counts.clear()

    def gather_tokens(self, x: Tensor, what: str) -> Tensor:
        """[T, …] of each rank of the column group → [P·T, …] in rank order (P = 1: the same tensor)."""
        return self._gather(x, self._column_group, self.columns, what)

    def gather_replicas(self, x: Tensor, what: str) -> Tensor:
        """[N, …] of this column in each replica → [R/P·N, …] in replica order (one replica: the same tensor)."""
        return self._gather(x, self._replica_group, self.replicas, what)

    def to_columns(self, x: Tensor, what: str) -> Tensor:
        """All columns of this rank's tokens [T, D] → this rank's columns of the group's tokens [P·T, D/P]."""
        if self.columns == 1:
            return x
        tokens, width = x.shape
        send = x.view(tokens, self.columns, width // self.columns).transpose(0, 1).contiguous()
        return self._all_to_all(send, self._column_group, self.columns, what).flatten(0, 1)

    def to_tokens(self, x: Tensor, what: str) -> Tensor:
        """This rank's columns of the group's tokens [P·T, D/P] → all columns of this rank's tokens [T, D]."""
        if self.columns == 1:
            return x
        send = x.contiguous().view(self.columns, -1, x.shape[1])
        return self._all_to_all(send, self._column_group, self.columns, what).transpose(0, 1).flatten(1)

    def sum_columns(self, x: Tensor, what: str) -> Tensor:
        """Each column's part [P·T, …] for the group's tokens → their sum [T, …] for this rank's tokens.

        The bytes are those of a reduce-scatter; the order is that of the columns.
        """
        if self.columns == 1:
            return x
        send = x.contiguous().view(self.columns, -1, *x.shape[1:])
        return _in_order(self._all_to_all(send, self._column_group, self.columns, what))

    def sum(self, x: Tensor, what: str = "sums") -> Tensor:
        """fp64 of any shape, summed over all ranks in rank order: the same bits on every rank.

        Bytes: (R − 1)·8 per number up to 4096 numbers, in one collective; 2·(R − 1)/R·8 above, in two.
        """
        if self.size == 1:
            return x
        if x.numel() <= SMALL:
            return _in_order(self._gather(x.reshape(1, -1), None, self.size, what)).view(x.shape)
        padded = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % self.size)).view(self.size, -1)
        part = _in_order(self._all_to_all(padded, None, self.size, what))
        return self._gather(part, None, self.size, what)[: x.numel()].view(x.shape)

    def maximum(self, x: Tensor, what: str = "sums") -> Tensor:
        """The largest over all ranks, of any shape and dtype. Bytes as of a ring: 2·(R − 1)/R of the tensor's."""
        if self.size == 1:
            return x
        largest = x.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        self._counts[what] += 2 * (self.size - 1) * x.nbytes // self.size
        return largest

    def _gather(self, x: Tensor, group: Any, size: int, what: str) -> Tensor:
        if size == 1:
            return x
        x = x.contiguous()
        everyone = x.new_empty(size * x.shape[0], *x.shape[1:])
        getattr(dist, _ALL_GATHER)(everyone, x, group=group)
        self._counts[what] += (size - 1) * x.nbytes
        return everyone

    def _all_to_all(self, send: Tensor, group: Any, size: int, what: str) -> Tensor:
        """[ranks, …], part r for rank r → [ranks, …], part r from rank r."""
        received = torch.empty_like(send)
        dist.all_to_all_single(received, send, group=group)
        self._counts[what] += send.nbytes // size * (size - 1)
        return received

    def _make_groups(self) -> tuple[Any, Any]:
        """This rank's column group and replica group; None (all ranks) where such a group is the whole world."""
        mine: list[Any] = []
        neighbours = [range(r * self.columns, (r + 1) * self.columns) for r in range(self.replicas)]
        equals = [range(c, self.size, self.columns) for c in range(self.columns)]
        for groups, of_mine in ((neighbours, self.replica), (equals, self.column)):
            # Every rank makes every group, in one order, as torch wants it.
            trivial = len(groups) == 1 or len(groups) == self.size
            made = [None if trivial else dist.new_group(list(ranks), timeout=WAIT) for ranks in groups]
            mine.append(made[of_mine])
        return mine[0], mine[1]


def _rejoin(size: int, rank: int, columns: int, early: bool) -> Exchange:
    """An Exchange as it was pickled. Raises UsageError when this process is not that rank of as many."""
    if size == 1:
        exchange = Exchange.alone()
        exchange._early = early
        return exchange
    joined = dist.is_available() and dist.is_initialized()
    here = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    if here != (rank, size):
        raise UsageError(
            f"this memory was pickled on rank {rank} of {size}, and this is rank {here[0]} of {here[1]}; load it on as "
            "many ranks, each its own file, or save state_dict() of full tables instead of the module"
        )
    return Exchange(columns)


def _in_order(parts: Tensor) -> Tensor:
    """[ranks, …] → the sum over ranks, added one after the other."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
