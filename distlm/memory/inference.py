"""A product-key memory that is only read: what an exported model computes with, on torch alone.

`distlm export hf` copies this module's definitions, and those that they use, into the folder.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlm.memory.layer import OutputGate
from distlm.memory.norm import by_running_statistics
from distlm.memory.retrieval import best_slots


class MemoryValues(nn.ParameterList):
    """The K values of width D of a memory, without gradients, cut by columns: part i is [K, columns[i]], so that no
    tensor is too large for a file."""

    def __init__(self, slots: int, columns: Sequence[int]) -> None:
        super().__init__(nn.Parameter(torch.zeros(slots, part), requires_grad=False) for part in columns)

    def sums(self, slots: Tensor, weights: Tensor) -> Tensor:
        """slots int32 [T, A], weights [T, A] → Σ over A of weights·value[slots], [T, D]."""
        bags = [F.embedding_bag(slots, v, mode="sum", per_sample_weights=weights.to(v.dtype)) for v in self]
        return torch.cat(bags, dim=1)


class MemoryReader(nn.Module):
    """PKM(x) of Lample et al. (2019, section 3.1), the heads summed: Σ over heads and slots of softmax(scores)·value.

    Slot i₁·n + i₂ of K = n² has the key (half key i₁, half key i₂). There is no dropout inside, and the query norm
    keeps the statistics that training left. Several memories can read the same values, and the output can be gated, as
    in Berges et al. (2024).
    """

    norm_mean: Tensor
    norm_variance: Tensor

    def __init__(self, memory: Mapping[str, Any], width: int, values: MemoryValues | None = None) -> None:
        """memory: heads (H), sub_keys (n), k (slots that a head reads), key_width, query_norm, gated, and
        value_columns, whose sum is `width` (D). `values`: those of another memory, to be read here, too."""
        super().__init__()
        self.heads, self.k, self.query_norm = memory["heads"], memory["k"], memory["query_norm"]
        channels, half = self.heads * memory["key_width"], memory["key_width"] // 2
        self.query = nn.Linear(width, channels)
        self.keys = nn.Parameter(torch.empty(self.heads, 2, memory["sub_keys"], half))
        nn.init.uniform_(self.keys, -(half**-0.5), half**-0.5)
        if self.query_norm:
            self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
            self.register_buffer("norm_mean", torch.zeros(channels))
            self.register_buffer("norm_variance", torch.ones(channels))
        self.gate = OutputGate(width, None) if memory.get("gated") else None
        if values is None:
            self.values = values = MemoryValues(memory["sub_keys"] ** 2, memory["value_columns"])
        # In a list they are no part of this module: another one's are saved once, with that one.
        self._read = [values]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → the same shape and dtype; there may be no token at all."""
        flat = x.reshape(-1, x.shape[-1])
        queries = self.query(flat)
        if self.query_norm:
            queries = by_running_statistics(
                queries, self.norm_mean, self.norm_variance, self.norm_weight, self.norm_bias
            )
        slots, scores = best_slots(queries.unflatten(1, (self.heads, -1)), self.keys, self.k)
        read: Tensor = self._read[0].sums(slots.flatten(1), scores.softmax(2).flatten(1)).to(x.dtype).view(x.shape)
        return read if self.gate is None else self.gate(x, read)


def make_readers(memory: Mapping[str, Any]) -> dict[int, MemoryReader]:
    """The memories of a model: layer of memory["positions"], counted from 1 → its memory. With "shared" all read the
    values of the first."""
    made: dict[int, MemoryReader] = {}
    for position in memory["positions"]:
        values = next(iter(made.values())).values if memory.get("shared") and made else None
        made[position] = MemoryReader(memory, sum(memory["value_columns"]), values)
    return made
