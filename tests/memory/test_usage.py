"""Counters and measures of the use of slots, against numbers computed by hand."""

import math

import numpy as np
import pytest
import torch
from support.present import present

from distlm.memory.measures import (
    class_divergence,
    divergence_from_uniform,
    gini,
    intersection_over_union,
    staleness,
    used_share,
)
from distlm.memory.usage import Usage, UsageCounts
from distlm.memory.values.exchange import Exchange

SLOTS = torch.tensor([[[0, 1], [1, 3]], [[2, 0], [0, 4]], [[5, 3], [5, 4]]], dtype=torch.int32)
WEIGHTS = torch.tensor([[[0.75, 0.25], [1.0, 0.0]], [[0.5, 0.5], [0.625, 0.375]], [[0.9, 0.1], [0.9, 0.1]]])
COUNTED = torch.tensor([True, True, False])
ARRAYS = [np.array, torch.tensor]


def used() -> Usage:
    usage = Usage(6)
    usage.add(SLOTS, WEIGHTS, COUNTED, update=7)
    return usage


def as_lists(counts: UsageCounts) -> dict[str, list[float]]:
    return {name: getattr(counts, name).tolist() for name in ("reads", "top1", "weights", "last_read", "last_top1")}


FIRST = {
    "reads": [3, 2, 1, 0, 1, 0],
    "top1": [2, 1, 1, 0, 0, 0],
    "weights": [1.875, 1.25, 0.5, 0.0, 0.375, 0.0],
    "last_read": [7, 7, 7, 0, 7, 0],
    "last_top1": [7, 7, 7, 0, 0, 0],
}


def test_counters_by_hand() -> None:
    """The third token does not count (slots 3 and 5), and the read of slot 3 has weight 0."""
    usage = used()
    counts = usage.counts()
    assert as_lists(counts) == FIRST
    assert counts.reads.dtype == counts.top1.dtype == torch.int64
    assert counts.weights.dtype == torch.float64
    assert counts.last_read.dtype == counts.last_top1.dtype == torch.int32
    usage.add(SLOTS[2:], WEIGHTS[2:], torch.tensor([True]), update=9)
    assert as_lists(counts) == FIRST, "counts() are copies"
    assert usage.counts().reads.tolist() == [3, 2, 1, 1, 2, 2]
    assert usage.counts().top1.tolist() == [2, 1, 1, 0, 0, 2]
    assert usage.counts().last_read.tolist() == [7, 7, 7, 9, 9, 9]
    assert usage.counts().last_top1.tolist() == [7, 7, 7, 0, 0, 9]
    usage.reset()
    assert as_lists(usage.counts()) | {"last_read": 0, "last_top1": 0} == {
        "reads": [0] * 6, "top1": [0] * 6, "weights": [0] * 6, "last_read": 0, "last_top1": 0,
    }  # fmt: skip
    assert usage.counts().last_read.tolist() == [7, 7, 7, 9, 9, 9]


def test_many_reads_are_counted_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(0, 50, (4000, 4, 32), generator=generator)
    weights = torch.rand(4000, 4, 32, generator=generator).softmax(2)
    counted = torch.rand(4000, generator=generator) < 0.8
    usage = Usage(50)
    for part in range(4):
        rows = slice(part * 1000, (part + 1) * 1000)
        usage.add(slots[rows].int(), weights[rows], counted[rows], part + 1)
    counts = usage.counts()
    assert torch.equal(counts.reads, torch.bincount(slots[counted].flatten(), minlength=50))
    assert torch.equal(counts.top1, torch.bincount(slots[counted][..., 0].flatten(), minlength=50))
    wanted = torch.bincount(slots[counted].flatten(), weights[counted].flatten().double(), minlength=50)
    torch.testing.assert_close(counts.weights, wanted, rtol=1e-12, atol=0)
    assert counts.weights.sum().item() == pytest.approx(4 * int(counted.sum()), rel=1e-6)


def test_kept_and_continued() -> None:
    counts = used().reduced(Exchange.alone())
    assert as_lists(counts) == FIRST
    first, second = Usage(6), Usage(6)
    first.load(counts, first_rank=True)
    second.load(counts, first_rank=False)
    assert as_lists(first.counts()) == FIRST
    assert second.counts().reads.sum() == second.counts().top1.sum() == second.counts().weights.sum() == 0
    assert second.counts().last_read.tolist() == FIRST["last_read"]
    with pytest.raises(ValueError, match="reads has the shape"):
        Usage(7).load(counts, first_rank=True)


def test_measures_of_counters() -> None:
    measures = used().counts().measures()
    assert measures.mu == pytest.approx(4 / 6)
    assert measures.top1_mu == pytest.approx(3 / 6)
    # log 6 + (3/7 log 3/7 + 2/7 log 2/7 + 2 · 1/7 log 1/7)
    assert measures.kl_u == pytest.approx(1.7917595 - 0.3631277 - 0.3579323 - 0.5559743, abs=1e-6)
    shares = [15 / 32, 10 / 32, 4 / 32, 3 / 32]
    assert measures.kl_w == pytest.approx(math.log(6) + sum(share * math.log(share) for share in shares))
    # Sorted weights 0, 0, 3, 4, 10, 15 of 32: cumulated 0, 0, 3, 7, 17, 32.
    assert measures.gini == pytest.approx(1 + 1 / 6 - 2 * (0 + 0 + 3 + 7 + 17 + 32) / 32 / 6)
    empty = Usage(4).counts().measures()
    assert empty.mu == empty.top1_mu == 0
    assert math.isnan(present(empty.kl_u))
    assert math.isnan(present(empty.gini))


@pytest.mark.parametrize("array", ARRAYS)
def test_even_and_single_use(array) -> None:
    even, single = array([5, 5, 5, 5]), array([0, 9, 0, 0])
    assert used_share(even) == 1
    assert used_share(single) == 0.25
    assert divergence_from_uniform(even) == pytest.approx(0, abs=1e-15)
    assert divergence_from_uniform(single) == pytest.approx(math.log(4))
    assert gini(even) == pytest.approx(0, abs=1e-15)
    assert gini(single) == pytest.approx(3 / 4)
    # Two of four slots, evenly: 1 + 1/4 − 2·(0 + 0 + 1/2 + 1)/4.
    assert gini(array([1, 0, 1, 0])) == pytest.approx(0.5)
    assert divergence_from_uniform(array([1, 0, 1, 0])) == pytest.approx(math.log(2))


def test_large_counts_keep_their_last_digit() -> None:
    counts = torch.full((4,), 2**40, dtype=torch.int64)
    counts[0] += 4
    assert 0 < gini(counts) < 1e-11


@pytest.mark.parametrize("array", ARRAYS)
def test_two_classes(array) -> None:
    positive, negative = array([2, 2, 0, 0]), array([1, 2, 1, 0])
    # Shares 1/2 1/2 0 0 and 1/4 1/2 1/4 0.
    assert intersection_over_union(positive, negative) == pytest.approx((1 / 4 + 1 / 2) / (1 / 2 + 1 / 2 + 1 / 4))
    assert class_divergence(positive, negative, spread=0) == pytest.approx(0.5 * math.log(2))
    assert class_divergence(negative, positive, spread=0) == math.inf
    p, q = ([0.9 * share + 0.025 for share in shares] for shares in ([0.25, 0.5, 0.25, 0], [0.5, 0.5, 0, 0]))
    wanted = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert class_divergence(negative, positive, spread=0.1) == pytest.approx(wanted)
    assert class_divergence(positive, positive) == intersection_over_union(positive, positive) - 1 == 0
    # The size of a class does not matter.
    assert class_divergence(positive * 100, negative) == pytest.approx(class_divergence(positive, negative))
    apart = array([1, 1, 0, 0]), array([0, 0, 1, 1])
    assert intersection_over_union(*apart) == 0
    assert 0 < class_divergence(*apart) < math.log(4 / 0.01)
    assert math.isnan(class_divergence(positive, positive * 0))
    assert math.isnan(intersection_over_union(positive, positive * 0))


@pytest.mark.parametrize("array", ARRAYS)
def test_staleness(array) -> None:
    last = array([0, 1, 100, 101, 200, 200, 0])
    assert staleness(last, [0, 100, 200]).tolist() == [2, 2, 3]
    assert staleness(last, [0, 100, 200, 300]).tolist() == [2, 2, 3, 0]
    assert staleness(last, [99, 200]).tolist() == [3, 4]
    with pytest.raises(ValueError, match="update 200"):
        staleness(last, [0, 100])


def test_stale_share() -> None:
    """Of 10 updates the latest fifth is 9 and 10."""
    never, old, fresh = [0, 0], [1, 8], [9, 10, 10, 10]
    last = torch.tensor([*never, *old, *fresh], dtype=torch.int32)
    none = torch.zeros(8, dtype=torch.int64)
    counts = UsageCounts(none, none, none.double(), last, last)
    assert counts.stale_share(10) == pytest.approx(4 / 8)
    assert counts.stale_share(1) == pytest.approx(2 / 8)
