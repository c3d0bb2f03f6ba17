"""The kernel's best slots against a stable sort of all n² scores: random, tied, rounded, not finite."""

import pytest
import torch
from support.kernels import DEVICE, taking
from support.memory import brute_force
from torch import Tensor

from distlm.kernels import slots as kernel
from distlm.memory.retrieval import _candidates, select


def inputs(tokens: int, heads: int, sub_keys: int, key_width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(tokens, heads, key_width, generator=generator)
    keys = torch.randn(heads, 2, sub_keys, key_width // 2, generator=generator)
    return queries.to(DEVICE), keys.to(DEVICE)


def equal(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert found[0].dtype == torch.int32 and found[1].dtype == torch.float32
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize(
    ("tokens", "heads", "sub_keys", "k"),
    [(3, 2, 16, 4), (2, 1, 13, 1), (2, 2, 5, 5), (3, 1, 2, 2), (2, 2, 1, 1), (1, 1, 100, 32), (0, 2, 8, 3)],
)
def test_random_scores(tokens: int, heads: int, sub_keys: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = inputs(tokens, heads, sub_keys, 8)
    taking(monkeypatch, "slots")
    equal(select(queries, keys, k), brute_force(queries, keys, k))


def test_1024_sub_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = inputs(1, 1, 1024, 8)
    taking(monkeypatch, "slots")
    equal(select(queries, keys, 32), brute_force(queries, keys, 32))


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_ties_go_to_the_lowest_slot(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small whole numbers: half scores and sums tie everywhere, at the boundary and inside."""
    generator = torch.Generator().manual_seed(levels)
    queries = torch.randint(-levels, levels + 1, (5, 2, 6), generator=generator).float().to(DEVICE)
    keys = torch.randint(0, levels, (2, 2, 7, 3), generator=generator).float().to(DEVICE)
    taking(monkeypatch, "slots")
    equal(select(queries, keys, 4), brute_force(queries, keys, 4))


def test_rounded_sums_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half scores that differ by less than their sum shows: the slot that is lowest among all n² wins, though its half
    is not among the best."""
    halves = torch.tensor([[0.0, 2.0**-32, 2.0**-31, 2.0**-30, 2.0**-29], [2.0**10, *4 * [-(2.0**20)]]])
    queries, keys = torch.ones(1, 1, 2).to(DEVICE), halves.view(1, 2, 5, 1).to(DEVICE)
    taking(monkeypatch, "slots")
    found = select(queries, keys, 2)
    equal(found, brute_force(queries, keys, 2))
    assert found[0].flatten().tolist() == [0, 5]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_scores_that_are_not_finite_give_valid_slots(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = inputs(2, 1, 5, 4)
    keys[:, 0, 3] = bad
    queries[1] = bad
    taking(monkeypatch, "slots")
    found = select(queries, keys, 3)[0]
    assert ((found >= 0) & (found < 25)).all()


def test_minus_zero_is_zero() -> None:
    halves = torch.tensor([-0.0, 0.0, -0.0, -1.0]).expand(1, 2, 1, 4).contiguous().to(DEVICE)
    left, right = _candidates(4, 4, DEVICE)
    slots, scores, following = kernel.best_slots(halves, left, right, 3)
    assert slots.flatten().tolist() == [0, 1, 2]
    assert scores.flatten().tolist() == [0.0, 0.0, 0.0] and following.item() == 0.0


def test_gradients_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for operations in ((), ("slots",)):
        taking(monkeypatch, *operations)
        queries, keys = (x.half().requires_grad_() for x in inputs(2, 2, 8, 4))
        scores = select(queries, keys, 3)[1]
        found.append([scores.detach(), *torch.autograd.grad(scores.square().sum(), (queries, keys))])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_fp64_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = (x.double() for x in inputs(2, 1, 8, 4))
    monkeypatch.setattr(kernel, "best_slots", None)
    taking(monkeypatch, "slots")
    assert select(queries, keys, 3)[1].dtype == torch.float64
