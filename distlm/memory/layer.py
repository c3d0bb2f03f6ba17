"""A product-key memory: x → query → the k best slots of each head → softmax → the weighted sum of their values.

With a gate the output is that of Berges et al. 2024 ("Memory Layers at Scale").
"""

import math
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from distlm.memory.check import check_section
from distlm.memory.config import MemoryConfig
from distlm.memory.retrieval import ProductKeys
from distlm.memory.usage import Usage, UsageCounts
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.table import ValueTable

Dropout = Callable[[Tensor, float, str], Tensor]
_DEFAULTS = MemoryConfig(kind="pkm")


def _dropout(tensor: Tensor, p: float, place: str) -> Tensor:
    return F.dropout(tensor, p)


class ProductKeyMemory(nn.Module):
    """PKM(x) of Lample et al. (2019, §3) with the heads summed: Σ over heads and slots of softmax(scores)·value.

        memory = ProductKeyMemory(256, sub_keys=128)        # 128² slots of 256 values
        y = x + memory(x)
        values = SparseValueOptimizer(model)                # beside the optimizer of model.parameters()

    What stands beside it in a layer (residual, weight β, layer norm: Kim & Jung 2020, §3) is the caller's. Parameters
    are those of `retrieval` (ProductKeys). The values, fp32 [K, D] with K = sub_keys², are no parameters:
    DistributedDataParallel, ZeRO and casts do not see them, SparseValueOptimizer updates them. They are in
    `state_dict()` all the same, beside the query norm's statistics; a dict without them is not loaded, strict or not.

    On several ranks of torch.distributed (initialised before) the ranks share the columns of the values, so that rank r
    holds [K, D/R] and its state dict has those (`table.columns` says which). In training, and in evaluation on several
    ranks, every rank calls it equally often with equally many tokens: it holds collectives.
    """

    def __init__(
        self,
        width: int,
        *,
        sub_keys: int = _DEFAULTS.sub_keys,
        heads: int = _DEFAULTS.heads,
        k: int = _DEFAULTS.k,
        key_width: int = _DEFAULTS.key_width,
        query_norm: bool = _DEFAULTS.query_norm,
        norm_momentum: float = _DEFAULTS.norm_momentum,
        input_dropout: float = _DEFAULTS.input_dropout,
        query_dropout: float = _DEFAULTS.query_dropout,
        value_dropout: float = _DEFAULTS.value_dropout,
        values: Literal["normal", "zero"] = _DEFAULTS.values,
        frozen: bool = _DEFAULTS.frozen,
        columns: int = _DEFAULTS.columns,
        seed: int | None = None,
        layer: int = 0,
        exchange: Exchange | None = None,
    ) -> None:
        """width: D, of input and output. sub_keys: n half keys of each half, K = n² slots. heads: H. k: slots read by
        each head for each token. key_width: of a head's query. query_norm: batch norm of the queries over the tokens
        of all ranks, norm_momentum the weight of the newest batch. The dropouts are probabilities. values: N(0, 1/D),
        or zero, so that x + memory(x) starts as x. frozen: the values stay as they are.

        columns: ranks that share the columns of one copy of the values (0: all, 1: a full copy on every rank).
        exchange: the ranks, if they are to be others than that (`Exchange.alone()`: this process by itself).
        seed and layer decide the first keys, query weights and values, alike on all ranks; without a seed it is drawn
        from torch's generator (of rank 0), as first weights of torch's layers are. Memories of one seed need different
        layers.

        Raises UsageError naming the setting that cannot work. Collective on several ranks.
        """
        config = MemoryConfig(
            kind="pkm", sub_keys=sub_keys, heads=heads, k=k, key_width=key_width, query_norm=query_norm,
            norm_momentum=norm_momentum, input_dropout=input_dropout, query_dropout=query_dropout,
            value_dropout=value_dropout, values=values, frozen=frozen, columns=columns,
        )  # fmt: skip
        check_section(config)
        exchange = Exchange(columns) if exchange is None else exchange
        seed = exchange.of_rank_0(int(torch.randint(1 << 62, ()))) if seed is None else seed
        self._build(config, width, layer, seed, exchange, _dropout)

    @classmethod
    def of(
        cls, config: MemoryConfig, width: int, layer: int, seed: int, exchange: Exchange, dropout: Dropout = _dropout
    ) -> "ProductKeyMemory":
        """The memory of the section `memory` of a configuration: what the models of this package are built with.

        `dropout(tensor, p, place)` is called in training for every p > 0 with tensors [B, T, …], so that it can draw by
        row.
        """
        memory = cls.__new__(cls)
        memory._build(config, width, layer, seed, exchange, dropout)
        return memory

    def _build(
        self, config: MemoryConfig, width: int, layer: int, seed: int, exchange: Exchange, dropout: Dropout
    ) -> None:
        super().__init__()
        self.config, self.exchange, self.dropout = config, exchange, dropout
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(struct.pack("<2q", seed, layer)) >> 1)
        self.retrieval = ProductKeys(config, width, exchange, generator)
        self.table = ValueTable(config, width, layer, seed, exchange)
        self.gate = OutputGate(width, generator) if config.gated else None
        self.usage = Usage(config.sub_keys**2)
        self._update: int | None = None
        self._measured: Usage | None = None

    @property
    def update(self) -> int:
        """Number of the update under way, from 1, by which reads are dated: one more than the values have had, or what
        a trainer has set."""
        return self.table.updates + 1 if self._update is None else self._update

    @update.setter
    def update(self, number: int) -> None:
        self._update = number

    def forward(self, x: Tensor, mask: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
        """x [B, T, D], or [..., D] of any number of dimensions → the same shape, in the dtype of x.

        mask bool [B, T] (true: no padding): the tokens of the query norm's statistics; None: all. counted bool [B, T]:
        those whose reads are counted (no padding, no special tokens); None: those of the mask. Raises ValueError for
        another width. There may be no token at all: [0, D] or [B, 0, D].
        """
        shape, width = x.shape, self.table.width
        if x.ndim == 0 or shape[-1] != width:
            raise ValueError(f"the memory's width is {width}, its input is {list(shape)}")
        # [N, D] is one row of N tokens.
        rows, tokens = math.prod(shape[:-2]), shape[-2] if x.ndim > 1 else 1
        x = x.reshape(rows, tokens, width)
        mask = torch.ones(rows, tokens, dtype=torch.bool, device=x.device) if mask is None else mask
        x = self._drop(x, self.config.input_dropout, "input")
        slots, scores = self.retrieval(
            x.reshape(-1, width), mask.reshape(-1),
            lambda q: self._drop(q.view(rows, tokens, q.shape[1]), self.config.query_dropout, "query").view_as(q),
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
        return self._drop(read, self.config.value_dropout, "value").view(shape)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Keys and queries without the values they point at are a memory that was lost: an error, strict or not.
        Nothing at all of it (the weights of a model without memory) is none with strict=False, but is said."""
        mine = [name for name in state_dict if name.startswith(prefix)]
        if mine and f"{prefix}table.values" not in state_dict:
            error_msgs.append(
                f"{prefix}table.values: missing beside {mine[0]}: the values of this memory were not saved, and a "
                "memory is nothing without them. Save model.state_dict() whole"
            )
        elif not mine:
            warnings.warn(
                f"load_state_dict: nothing of the memory {prefix[:-1] or type(self).__name__}; it stays as it was",
                stacklevel=2,
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

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

    def extra_repr(self) -> str:
        return f"{self.table.width}, heads={self.config.heads}, k={self.config.k}, key_width={self.config.key_width}"

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
