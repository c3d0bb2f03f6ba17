"""A product-key memory: x → query → the k best slots of each head → softmax → the weighted sum of their values.

With a gate the output is that of Berges et al. 2024 ("Memory Layers at Scale").
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from distlm.memory.config import MemoryConfig
from distlm.memory.retrieval import ProductKeys
from distlm.memory.usage import Usage, UsageCounts
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.table import ValueTable

Dropout = Callable[[Tensor, float, str], Tensor]


class ProductKeyMemory(nn.Module):
    """PKM(x) of Lample et al. with the heads summed: Σ over heads and slots of softmax(scores)·value.

    Weight β, layer norm and what else stands beside it in a layer are the caller's. In training, and in evaluation on
    several ranks, every rank calls it equally often with equally many tokens: it holds collectives.

    `layer` and `seed` give the first keys, query weights and values, whatever else is drawn. `dropout(tensor, p,
    place)` is called in training for every p > 0 with tensors [B, T, …], so that it can draw by row. `update` is the
    number of the update under way, from 1, by which the reads are dated: the trainer sets it.

    Parameters are those of `retrieval` (ProductKeys) and, with config.gated, of `gate` (OutputGate); the values are no
    parameter (ValueTable).
    """

    def __init__(
        self, config: MemoryConfig, width: int, layer: int, seed: int, exchange: Exchange,
        dropout: Dropout = lambda tensor, p, place: F.dropout(tensor, p),
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.exchange, self.dropout = config, exchange, dropout
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(struct.pack("<2q", seed, layer)) >> 1)
        self.retrieval = ProductKeys(config, width, exchange, generator)
        self.table = ValueTable(config, width, layer, seed, exchange)
        self.gate = OutputGate(width, generator) if config.gated else None
        self.usage = Usage(config.sub_keys**2)
        self.update = 1
        self._measured: Usage | None = None

    @classmethod
    def of(
        cls, config: MemoryConfig, width: int, layer: int, seed: int, exchange: Exchange,
        dropout: Dropout = lambda tensor, p, place: F.dropout(tensor, p),
    ) -> "ProductKeyMemory":  # fmt: skip
        """The memory of the section `memory` of a configuration: what the models of this package are built with."""
        return cls(config, width, layer, seed, exchange, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
        """x [B, T, D] → [B, T, D] in the dtype of x.

        mask bool [B, T] (true: no padding): the tokens of the query norm's statistics; None: all. counted bool [B, T]:
        those whose reads are counted (no padding, no special tokens); None: those of the mask.
        """
        rows, tokens, width = x.shape
        mask = torch.ones(rows, tokens, dtype=torch.bool, device=x.device) if mask is None else mask
        x = self._drop(x, self.config.input_dropout, "input")
        slots, scores = self.retrieval(
            x.reshape(-1, width), mask.reshape(-1),
            lambda q: self._drop(q.view(rows, tokens, -1), self.config.query_dropout, "query").view(rows * tokens, -1),
        )  # fmt: skip
        weights = scores.softmax(2)
        usage = self._measured or (self.usage if self.training else None)
        if usage is not None:
            counted = mask if counted is None else counted
            usage.add(slots, weights.detach(), counted.reshape(-1), self.update)
        values: Tensor = self.table(slots.flatten(1), weights.flatten(1), x.dtype)
        read = values.view(rows, tokens, width)
        if self.gate is not None:
            read = self.gate(x, read)
        return self._drop(read, self.config.value_dropout, "value")

    @contextmanager
    def measure(self) -> Iterator[Usage]:
        """Inside it all reads, in evaluation too, are counted in a fresh Usage instead of in `usage`."""
        self._measured = Usage(self.usage.slots)
        try:
            yield self._measured
        finally:
            self._measured = None

    def extra_state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside parameters and values: the running statistics of the query norm and the
        counters of all ranks. Copies, the same on every rank. Collective."""
        counts = self.usage.reduced(self.exchange)
        tensors = {f"usage.{field.name}": getattr(counts, field.name) for field in fields(UsageCounts)}
        if self.retrieval.norm is not None:
            tensors |= {
                "norm.running_mean": self.retrieval.norm.running_mean.clone(),
                "norm.running_var": self.retrieval.norm.running_var.clone(),
            }
        return tensors

    def load_extra(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `extra_state_tensors`, on any number of ranks. KeyError for a missing one."""
        counts = UsageCounts(**{field.name: tensors[f"usage.{field.name}"] for field in fields(UsageCounts)})
        self.usage.load(counts, first_rank=self.exchange.rank == 0)
        if self.retrieval.norm is not None:
            self.retrieval.norm.running_mean.copy_(tensors["norm.running_mean"])
            self.retrieval.norm.running_var.copy_(tensors["norm.running_var"])

    def _drop(self, x: Tensor, p: float, place: str) -> Tensor:
        return self.dropout(x, p, place) if self.training and p > 0 else x


class OutputGate(nn.Module):
    """W₂(memory(x) ⊙ SiLU(W₁ x)), the output of Berges et al. 2024; W₁ and W₂ [D, D] without bias, N(0, 1/D)."""

    def __init__(self, width: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.gate, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        for part in (self.gate, self.out):
            nn.init.normal_(part.weight, std=width**-0.5, generator=generator)

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        """x and what was read for it [B, T, D] → the same shape. Zeros that were read stay zeros."""
        gated: Tensor = self.out(read * F.silu(self.gate(x)))
        return gated


@dataclass(frozen=True)
class MemorySize:
    """Numbers of one memory, without moments and counters."""

    values: int
    """Numbers in the values (K·D): learned, no parameters."""
    keys: int
    """Numbers in the half keys (H·2·n·key_width/2)."""
    query: int
    """Numbers in the query Linear, bias included."""
    norm: int
    """Numbers in weight and bias of the query norm."""
    gate: int = 0
    """Numbers in the two matrices of the gated output."""

    @property
    def total(self) -> int:
        return self.values + self.keys + self.query + self.norm + self.gate


def memory_size(config: MemoryConfig, width: int) -> MemorySize:
    """How large one memory of a model of this width is; nothing is built."""
    channels = config.heads * config.key_width
    return MemorySize(
        values=config.sub_keys**2 * width,
        keys=config.sub_keys * channels,
        query=(width + 1) * channels,
        norm=2 * channels if config.query_norm else 0,
        gate=2 * width**2 if config.gated else 0,
    )
