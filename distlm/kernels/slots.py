"""The k best slots of product keys from half scores: the best of both halves, and the best of their sums, in one pass.

The version in torch is distlm.memory.retrieval: two top-k over n, one over the sums that can win, and two sorts. A
score and its place are one whole number of 64 bits here, so that one comparison decides, and of equal scores the lowest
place comes first. Which slots have the last score is settled by the caller, where the score that follows equals it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distlm.kernels.launch import launch, power_of_two

_NOTHING = tl.constexpr(-0x8000000000000000)
"""Below the number of any score, whatever its bits."""


@triton.jit
def _numbers(scores, places, there):  # type: ignore[no-untyped-def]
    """fp32 and places → int64 that rise with the score, and fall with the place among equal scores."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(there, (rising.to(tl.int64) << 32) | (0xFFFFFFFF - places.to(tl.int64)), _NOTHING)


@triton.jit
def _scores(numbers):  # type: ignore[no-untyped-def]
    rising = (numbers >> 32).to(tl.int32)
    return (rising ^ ((rising >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _places(numbers):  # type: ignore[no-untyped-def]
    return (0xFFFFFFFF - (numbers & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _best(numbers, count, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """The `count` largest, falling, in a block of M; the numbers differ from each other."""
    order = tl.arange(0, M)
    best = tl.full([M], _NOTHING, dtype=tl.int64)
    for i in range(count):
        top = tl.max(numbers, axis=0)
        best = tl.where(order == i, top, best)
        numbers = tl.where(numbers == top, _NOTHING, numbers)
    return best


@triton.jit
def _best_of_half(halves, sub_keys, count, N: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, N)
    there = place < sub_keys
    return _best(_numbers(tl.load(halves + place, mask=there, other=0.0), place, there), count, M)


@triton.jit
def _best_slots(  # type: ignore[no-untyped-def]
    halves, left, right, slots, scores, following, tokens, sub_keys, candidates, k, more,
    N: tl.constexpr, M: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    row = head.to(tl.int64) * 2 * tokens + token
    count = tl.minimum(more, sub_keys)
    first = _best_of_half(halves + row * sub_keys, sub_keys, count, N, M)
    second = _best_of_half(halves + (row + tokens) * sub_keys, sub_keys, count, N, M)
    pair = tl.arange(0, C)
    there = pair < candidates
    of_first = tl.gather(first, tl.load(left + pair, mask=there, other=0), 0)
    of_second = tl.gather(second, tl.load(right + pair, mask=there, other=0), 0)
    slot = _places(of_first) * sub_keys + _places(of_second)
    best = _best(_numbers(_scores(of_first) + _scores(of_second), slot, there), more, K)
    out, order = head.to(tl.int64) * tokens + token, tl.arange(0, K)
    tl.store(slots + out * k + order, _places(best), mask=order < k)
    tl.store(scores + out * k + order, _scores(best), mask=order < k)
    tl.store(following + out + order * 0, _scores(best), mask=(order == k) & (order < more))


def best_slots(halves: Tensor, left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Half scores fp32 [H, 2, T, n] → slots int32 [H, T, k], their scores fp32 [H, T, k], and the score that follows
    fp32 [H, T] (NaN where there is none).

    left, right [c]: the places of the sums that can be among the k + 1 highest (candidate_pairs). Falling scores, of
    equal ones the lowest slot first. NaN counts as more than infinity. Time: k + 1 times the largest of n numbers.
    """
    heads, _, tokens, sub_keys = halves.shape
    slots = torch.empty(heads, tokens, k, dtype=torch.int32, device=halves.device)
    scores = torch.empty(heads, tokens, k, device=halves.device)
    following = torch.full((heads, tokens), torch.nan, device=halves.device)
    more = min(k + 1, sub_keys * sub_keys)
    n, m = power_of_two(sub_keys), power_of_two(min(more, sub_keys))
    launch(
        _best_slots, (tokens, heads), halves, halves.contiguous(), left.int(), right.int(), slots, scores, following,
        tokens, sub_keys, len(left), k, more,
        N=n, M=m, C=power_of_two(len(left)), K=power_of_two(more), num_warps=max(1, min(4, n // 256)),
    )  # fmt: skip
    return slots, scores, following
