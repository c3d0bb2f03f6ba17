"""Product keys: the k best of n² slots for each query, exactly, from 2·n key products (Lample et al. 2019, §3.1)."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distlm.kernels import choice
from distlm.memory.check import check_sizes
from distlm.memory.config import MemoryConfig
from distlm.memory.norm import QueryNorm
from distlm.memory.values.exchange import Exchange

# Half scores that are held at a time: 64 MiB in fp32; the same for the rows of pair sums of tied queries.
_CHUNK = 1 << 24


class ProductKeys(nn.Module):
    """Queries and half keys of one memory: H heads, n half keys of each half, K = n² slots; slot = i₁·n + i₂.

    Parameters: query (Linear D → H·key_width), norm.weight and norm.bias [H·key_width] (unless query_norm is off) and
    keys [H, 2, n, key_width/2]. `generator` (CPU) gives the first weights: keys from U(±1/√(key_width/2)), the Linear
    as torch's default.

    Raises UsageError when k, sub_keys, heads or key_width cannot work.
    """

    def __init__(self, config: MemoryConfig, width: int, exchange: Exchange, generator: torch.Generator) -> None:
        super().__init__()
        check_sizes(config)
        self.heads, self.sub_keys, self.k = config.heads, config.sub_keys, config.k
        channels, half = config.heads * config.key_width, config.key_width // 2
        # Fresh weights come from the generator alone: the rest of a model starts the same with and without memory.
        self.query = torch.nn.utils.skip_init(nn.Linear, width, channels)
        for weights in (self.query.weight, self.query.bias):
            nn.init.uniform_(weights, -(width**-0.5), width**-0.5, generator=generator)
        self.norm = QueryNorm(channels, config.norm_momentum, exchange) if config.query_norm else None
        self.keys = nn.Parameter(torch.empty(config.heads, 2, config.sub_keys, half))
        nn.init.uniform_(self.keys, -(half**-0.5), half**-0.5, generator=generator)

    def forward(self, x: Tensor, mask: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """x [T, D], mask bool [T] (true: no padding) → slots int32 [T, H, k], scores fp32 [T, H, k]; see `select`.

        `drop`, given queries [T, H·key_width], is their dropout.
        """
        queries = self.query(x)
        if self.norm is not None:
            queries = self.norm(queries, mask)
        if drop is not None:
            queries = drop(queries)
        return select(queries.unflatten(1, (self.heads, -1)), self.keys, self.k)


def select(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k slots of the highest score for each query, exactly.

    queries [T, H, key_width], keys [H, 2, n, key_width/2], of any precision → slots int32 [T, H, k], scores fp32
    [T, H, k] (fp64 for fp64), falling. The score of slot i₁·n + i₂ is the fp32 sum of its two half scores q₁·k₁ and
    q₂·k₂, themselves in fp32; of equal scores the lowest slot comes first: what a stable sort of all n² scores gives.
    A query that gives infinite or NaN scores gets some valid slots.

    Differentiable in queries and keys; what is kept for that are the queries and the slots. The largest tensors are the
    half scores of some tokens, 64 MiB, forward and backward.
    """
    return _Select.apply(queries, keys, k)


def best_slots(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `select` gives, with torch's own derivatives, which keep the half scores of all tokens."""
    parts = [_choose(half_scores(part, keys), k) for part in queries.split(_tokens_at_a_time(keys))]
    slots = torch.cat([part[0].transpose(0, 1) for part in parts]).int()
    return slots, torch.cat([part[1].transpose(0, 1) for part in parts])


def half_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """queries [T, H, key_width], keys [H, 2, n, key_width/2] → [H, 2, T, n] in fp32 (fp64 for fp64)."""
    heads, _, sub_keys, half = keys.shape
    exact = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    by_half = queries.reshape(-1, heads * 2, half).transpose(0, 1).to(exact)
    with torch.autocast(queries.device.type, enabled=False):
        scores = by_half @ keys.reshape(heads * 2, sub_keys, half).transpose(1, 2).to(exact)
    return scores.view(heads, 2, -1, sub_keys)


def candidate_pairs(k: int, sub_keys: int) -> list[tuple[int, int]]:
    """(i, j): the sums of the i-th best and the j-th best half score (from 0) that may be among the k highest.

    Any other sum has (i + 1)·(j + 1) − 1 ≥ k others at least as high: all those with both places at least as good.
    """
    return [(i, j) for i in range(sub_keys) for j in range(min(sub_keys, k // (i + 1)))]


@lru_cache
def _candidates(k: int, sub_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Cached, so they must not be inference tensors: a later training pass may keep them.
    with torch.inference_mode(False):
        left, right = torch.tensor(candidate_pairs(k, sub_keys), device=device).unbind(1)
        return left, right


def _choose(halves: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Half scores [H, 2, T, n] → slots [H, T, k], scores [H, T, k], as `select`.

    One sum more than asked for is selected. If it is lower than the k-th, then those k are the only ones, in whatever
    order torch.topk, which promises none, takes equal numbers. Else the k-th score is right and which slots have it is
    not: those queries (a few in 10⁵ of random ones) look at all slots. fp32 addition keeps ≥, so rounding may
    tie sums that the candidate argument puts in strict order, never reverse them; such ties are found as well.
    """
    sub_keys = halves.shape[3]
    more = min(k + 1, sub_keys * sub_keys)
    best, places = halves.topk(min(k + 1, sub_keys), dim=3)
    left, right = _candidates(more, sub_keys, halves.device)
    sums = best[:, 0].index_select(2, left) + best[:, 1].index_select(2, right)
    scores, chosen = sums.topk(more, dim=2)
    tied = (scores[..., k - 1] == scores[..., -1]) & scores[..., 0].isfinite() if more > k else None
    scores, chosen = scores[..., :k], chosen[..., :k]
    slots = places[:, 0].gather(2, left[chosen]) * sub_keys + places[:, 1].gather(2, right[chosen])
    if tied is not None:
        _settle_ties(halves, slots, scores, tied)
    slots, order = slots.sort(dim=2)
    scores, order = scores.gather(2, order).sort(dim=2, descending=True, stable=True)
    return slots.gather(2, order), scores


def _settle_ties(halves: Tensor, slots: Tensor, scores: Tensor, tied: Tensor) -> None:
    """Where `tied`, bool [H, T], the lowest of the slots that have the k-th of `scores`, in place: slots, scores
    [H, T, k]."""
    heads, tokens = tied.nonzero(as_tuple=True)
    rows = max(1, _CHUNK // halves.shape[3] ** 2)
    for h, t in zip(heads.split(rows), tokens.split(rows), strict=True):
        if len(h):
            found, best = _with_lowest_slots(halves[h, 0, t], halves[h, 1, t], scores[h, t], slots.shape[2])
            best, order = best.sort(dim=1, descending=True, stable=True)
            slots[h, t], scores[h, t] = found.gather(1, order).to(slots.dtype), best


def _by_kernel(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `best_slots` gives, of fp32 half scores, by the kernel."""
    from distlm.kernels import slots as kernel

    sub_keys = keys.shape[2]
    left, right = _candidates(min(k + 1, sub_keys * sub_keys), sub_keys, queries.device)
    parts = []
    for part in queries.split(_tokens_at_a_time(keys)):
        halves = half_scores(part, keys)
        slots, scores, following = kernel.best_slots(halves, left, right, k)
        _settle_ties(halves, slots, scores, (scores[..., -1] == following) & scores[..., 0].isfinite())
        parts.append((slots.transpose(0, 1), scores.transpose(0, 1)))
    return torch.cat([slots for slots, _ in parts]), torch.cat([scores for _, scores in parts])


def _with_lowest_slots(first: Tensor, second: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """first, second [Q, n] half scores, scores [Q, k] falling → the k slots [Q, k] that have them, lowest first where
    the last score has too many, and their scores; in the order of slots."""
    sums = (first[:, :, None] + second[:, None, :]).flatten(1)
    last = scores[:, -1:]
    above, level = sums > last, sums == last
    missing = k - above.sum(1, keepdim=True)
    taken = above | (level & (level.cumsum(1, dtype=torch.int32) <= missing))
    slots = taken.nonzero()[:, 1].view(-1, k)
    return slots, sums.gather(1, slots)


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
        fused = choice.taken("slots", queries.device) and queries.dtype != torch.float64 != keys.dtype
        slots, scores = (_by_kernel if fused else best_slots)(queries, keys, k)
        ctx.save_for_backward(queries, keys, slots)
        ctx.mark_non_differentiable(slots)
        return slots, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """A score pulls on two half scores; those of some tokens are laid out densely, for two matrix products."""
        queries, keys, slots = ctx.saved_tensors
        heads, _, sub_keys, half = keys.shape
        exact = upstream[1].dtype
        by_half = keys.reshape(heads * 2, sub_keys, half).to(exact)
        of_queries, of_keys = torch.empty_like(queries), torch.zeros_like(by_half)
        rows = _tokens_at_a_time(keys)
        with torch.autocast(queries.device.type, enabled=False):
            for part, ids, gradient, out in zip(
                *(tensor.split(rows) for tensor in (queries, slots, upstream[1], of_queries)), strict=True
            ):
                tokens = len(part)
                pairs = torch.stack((ids // sub_keys, ids % sub_keys)).permute(2, 0, 1, 3).long()
                pull = gradient.new_zeros(heads, 2, tokens, sub_keys)
                pull.scatter_add_(3, pairs, gradient.transpose(0, 1)[:, None].expand(pairs.shape))
                pull = pull.view(heads * 2, tokens, sub_keys)
                if ctx.needs_input_grad[0]:
                    out.copy_((pull @ by_half).transpose(0, 1).reshape(out.shape))
                if ctx.needs_input_grad[1]:
                    of_keys.baddbmm_(
                        pull.transpose(1, 2), part.reshape(tokens, heads * 2, half).transpose(0, 1).to(exact)
                    )
        return (
            of_queries if ctx.needs_input_grad[0] else None,
            of_keys.to(keys.dtype).view(keys.shape) if ctx.needs_input_grad[1] else None,
            None,
        )


def _tokens_at_a_time(keys: Tensor) -> int:
    heads, halves, sub_keys, _ = keys.shape
    return max(1, _CHUNK // math.prod((heads, halves, sub_keys)))
