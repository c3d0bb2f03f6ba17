"""Helpers of the tests of a memory's values: tables cut by hand, random reads, the same by a dense table."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from distlm.memory.config import MemoryConfig
from distlm.memory.retrieval import half_scores
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.optimizer import SparseValueOptimizer
from distlm.memory.values.table import ValueTable

SMALL = MemoryConfig(kind="resm", sub_keys=7, heads=2, k=3, lr=0.01)
READS = 6
WIDTH = 20


def brute_force(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `select` gives, by its definition: a stable sort of all n² scores. Takes T·H·n² numbers."""
    first, second = half_scores(queries, keys).unbind(1)
    scores = (first[..., :, None] + second[..., None, :]).flatten(2)
    ordered, slots = scores.sort(dim=2, descending=True, stable=True)
    return slots[..., :k].transpose(0, 1).int(), ordered[..., :k].transpose(0, 1)


def settings(**changes: Any) -> MemoryConfig:
    return dataclasses.replace(SMALL, **changes)


def part_of(columns: int, column: int) -> Exchange:
    """A rank's place among several, for what needs no others: making, saving and loading a table."""
    exchange = Exchange.alone()
    exchange.columns, exchange.column = columns, column
    return exchange


def make_table(width: int = WIDTH, columns: int = 1, column: int = 0, seed: int = 3, **changes: Any) -> ValueTable:
    return ValueTable(settings(**changes), width, 4, seed, part_of(columns, column))


def make(**changes: Any) -> tuple[ValueTable, SparseValueOptimizer]:
    """A table and its optimizer; with catch_up slots stay stale until they are read, however many are."""
    table = make_table(**changes)
    optimizer = SparseValueOptimizer.of(table.config, [table])
    optimizer.sweep = 2.0
    return table, optimizer


@dataclasses.dataclass
class Reads:
    """A micro-batch: slots int32 [T, A], weights fp32 [T, A], gradient [T, D] of the output."""

    slots: Tensor
    weights: Tensor
    upstream: Tensor

    def part(self, rank: int, ranks: int) -> "Reads":
        """The piece of one of some ranks."""
        return Reads(*(tensor.chunk(ranks)[rank].clone() for tensor in (self.slots, self.weights, self.upstream)))


def reads(
    seed: int, slots: int = 49, tokens: int = 12, count: int = READS, width: int = WIDTH, share: float = 0.6
) -> Reads:
    """Reads of a random `share` of the slots."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(slots, generator=generator)[: max(1, int(slots * share))]
    chosen = some[torch.randint(len(some), (tokens, count), generator=generator)].int()
    weights = torch.rand(tokens, count, generator=generator)
    return Reads(chosen, weights, torch.randn(tokens, width, generator=generator))


def backward(table: ValueTable, given: Reads, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Output and gradient of the weights; the table keeps what its own gradient is made of."""
    weights = given.weights.clone().requires_grad_()
    out = table(given.slots, weights, dtype)
    out.backward(given.upstream.to(dtype))
    assert weights.grad is not None
    return out.detach(), weights.grad


def dense_sums(values: Tensor, given: Reads) -> Tensor:
    """The output, through one row for every read: values [K, D], differentiable."""
    return (given.weights.to(values.dtype)[..., None] * values[given.slots.long()]).sum(1)


def dense_gradient(given: Reads, slots: int = 49) -> Tensor:
    """Gradient of the values, fp64 [K, D]."""
    parts = given.weights.double()[..., None] * given.upstream.double()[:, None]
    return torch.zeros(slots, parts.shape[2]).double().index_add_(0, given.slots.flatten().long(), parts.flatten(0, 1))
