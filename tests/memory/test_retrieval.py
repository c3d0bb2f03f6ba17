"""Product-key retrieval against a stable sort of all slots' scores: random, tied, rounded, half precision."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from support.memory import brute_force
from support.present import present
from torch import Tensor

from distlm.errors import DistlmError
from distlm.memory import retrieval
from distlm.memory.config import MemoryConfig
from distlm.memory.retrieval import ProductKeys, best_slots, candidate_pairs, half_scores, select
from distlm.memory.values.exchange import Exchange

SHAPES = [(50, 4, 32, 8, 16), (20, 2, 16, 16, 8), (20, 1, 16, 1, 8), (30, 3, 5, 3, 4), (7, 2, 2, 2, 2), (5, 2, 1, 1, 2)]
SMALL = MemoryConfig(kind="resm", sub_keys=8, heads=2, k=4, key_width=6)


def inputs(tokens: int, heads: int, sub_keys: int, key_width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(tokens, heads, key_width, generator=generator)
    return queries, torch.randn(heads, 2, sub_keys, key_width // 2, generator=generator)


def equal(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert found[0].dtype == torch.int32


def by_python(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Slots by sorting (−score, slot), scores in numpy's fp32."""
    first, second = half_scores(queries, keys).numpy().transpose(1, 0, 2, 3)
    slots = np.empty((queries.shape[0], queries.shape[1], k), np.int32)
    for h, t in np.ndindex(first.shape[:2]):
        scores = np.add.outer(first[h, t], second[h, t]).reshape(-1)
        assert scores.dtype == np.float32
        slots[t, h] = sorted(range(len(scores)), key=lambda slot: (-scores[slot], slot))[:k]
    return torch.from_numpy(slots)


@pytest.mark.parametrize("function", [best_slots, select])
def test_a_look_up_in_inference_mode_is_followed_by_one_with_gradients(function: Any) -> None:
    """Of a shape that no other test asks for, so that nothing of it is kept from before."""
    queries, keys = inputs(3, 2, 11, 6)
    with torch.inference_mode():
        wanted = function(queries, keys, 7)
    queries.requires_grad_()
    slots, scores = function(queries, keys.requires_grad_(), 7)
    scores.sum().backward()
    equal((slots, scores.detach()), wanted)
    assert queries.grad is not None and queries.grad.any() and keys.grad is not None and keys.grad.any()


def test_only_119_of_1024_sums_can_win() -> None:
    assert len(candidate_pairs(32, 512)) == 119
    assert set(candidate_pairs(4, 3)) == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)}


@pytest.mark.parametrize(("tokens", "heads", "sub_keys", "k", "key_width"), SHAPES)
def test_random_scores(tokens: int, heads: int, sub_keys: int, k: int, key_width: int) -> None:
    queries, keys = inputs(tokens, heads, sub_keys, key_width)
    found = select(queries, keys, k)
    equal(found, brute_force(queries, keys, k))
    assert torch.equal(found[0], by_python(queries, keys, k))
    assert found[0].shape == found[1].shape == (tokens, heads, k)
    assert found[1].dtype == torch.float32
    full = queries.double().view(tokens, heads, 2, -1)
    products = torch.einsum("thsd,hsnd->thsn", full, keys.double())
    sums = products[:, :, 0, :, None] + products[:, :, 1, None]
    exact = sums.flatten(2).gather(2, found[0].long())
    torch.testing.assert_close(found[1].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "heads", "sub_keys", "k", "key_width"), SHAPES)
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_ties_in_halves_and_sums_go_to_the_lowest_slot(
    tokens: int, heads: int, sub_keys: int, k: int, key_width: int, levels: int
) -> None:
    """Small whole numbers: half scores and sums tie everywhere, at the boundary and inside."""
    generator = torch.Generator().manual_seed(levels)
    queries = torch.randint(-levels, levels + 1, (tokens, heads, key_width), generator=generator).float()
    keys = torch.randint(0, levels, (heads, 2, sub_keys, key_width // 2), generator=generator).float()
    found = select(queries, keys, k)
    equal(found, brute_force(queries, keys, k))
    assert torch.equal(found[0], by_python(queries, keys, k))


def test_equal_keys_and_zero_queries() -> None:
    queries, keys = inputs(9, 2, 12, 8)
    queries[4] = 0
    keys[:, :, 5] = keys[:, :, 2]
    keys[1, 0] = keys[1, 0, :1]
    equal(select(queries, keys, 6), brute_force(queries, keys, 6))
    assert select(queries, keys, 6)[0][4].tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_sums_that_only_rounding_ties() -> None:
    """First halves near 1e8, where fp32 has steps of 8: a slot that another beats in both halves has its score."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.stack((1e8 + 8 * torch.randperm(16, generator=generator), 10 * torch.rand(16, generator=generator)))
    queries = torch.ones(1, 1, 2)
    keys = keys.view(1, 2, 16, 1)
    found = select(queries, keys, 5)
    equal(found, brute_force(queries, keys, 5))
    assert found[1].unique().numel() < 5
    places = half_scores(queries, keys)[0, :, 0].argsort(descending=True).argsort()
    reached = {(int(places[0][slot // 16]) + 1) * (int(places[1][slot % 16]) + 1) for slot in found[0].flatten()}
    assert max(reached) > 5, "the data do not need a slot from outside the candidates"


def test_random_queries_need_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    second_look = retrieval._with_lowest_slots

    def counted(*arguments: Any) -> Any:
        looked.append(len(arguments[0]))
        return second_look(*arguments)

    monkeypatch.setattr(retrieval, "_with_lowest_slots", counted)
    queries, keys = inputs(1000, 4, 64, 64)
    select(queries, keys, 32)
    assert sum(looked) <= 4
    select(queries[:10] * 0, keys, 32)
    assert sum(looked) >= 40


def test_a_part_of_the_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = (tensor.double().requires_grad_() for tensor in inputs(23, 2, 8, 6))
    with torch.no_grad():
        queries[3:8] = 0
    found = []
    for chunk in (1 << 24, 5 * 2 * 2 * 8, 1):
        monkeypatch.setattr(retrieval, "_CHUNK", chunk)
        slots, scores = select(queries, keys, 4)
        found.append((slots, scores, *torch.autograd.grad(scores.square().sum(), (queries, keys))))
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        for mine, wanted in zip(other[1:], found[0][1:], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_chosen_scores() -> None:
    queries, keys = (tensor.double().requires_grad_() for tensor in inputs(11, 3, 8, 6))
    assert torch.autograd.gradcheck(lambda q, c: select(q, c, 5)[1], (queries, keys))
    upstream = torch.randn(11, 3, 5, dtype=torch.float64)
    mine = torch.autograd.grad(select(queries, keys, 5)[1], (queries, keys), upstream)
    wanted = torch.autograd.grad(brute_force(queries, keys, 5)[1], (queries, keys), upstream)
    for gradient, reference in zip(mine, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-10)
    (alone,) = torch.autograd.grad(select(queries.detach(), keys, 5)[1], keys, upstream)
    torch.testing.assert_close(alone, mine[1])


def test_half_scores_of_all_tokens_are_not_kept_for_the_gradient() -> None:
    queries, keys = (tensor.requires_grad_() for tensor in inputs(64, 2, 128, 8))
    _, scores = select(queries, keys, 4)
    graph: Any = scores.grad_fn
    kept = sum(tensor.numel() for tensor in graph.saved_tensors)
    assert kept == queries.numel() + keys.numel() + scores.numel() < 64 * 2 * 2 * 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_and_selected_in_fp32(dtype: torch.dtype) -> None:
    queries, keys = (tensor.to(dtype).requires_grad_() for tensor in inputs(200, 2, 32, 16))
    slots, scores = select(queries, keys, 8)
    wanted = brute_force(queries.detach().float(), keys.detach().float(), 8)
    equal((slots, scores), wanted)
    assert scores.dtype == torch.float32
    assert brute_force(queries.detach().float(), keys.detach().float(), 8)[1].to(dtype).unique().numel() < 3200
    scores.sum().backward()
    assert present(queries.grad).dtype == present(keys.grad).dtype == dtype
    with torch.autocast("cpu", dtype=dtype):
        full = [tensor.detach().float().requires_grad_() for tensor in (queries, keys)]
        slots, scores = select(full[0], full[1], 8)
        equal((slots, scores), wanted)
        scores.sum().backward()
    expected = [tensor.detach().float().requires_grad_() for tensor in (queries, keys)]
    select(expected[0], expected[1], 8)[1].sum().backward()
    for mine, exact in zip(full, expected, strict=True):
        assert torch.equal(present(mine.grad), present(exact.grad))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("whole", [True, False])
def test_infinite_queries_give_valid_slots(bad: float, whole: bool) -> None:
    queries, keys = inputs(6, 2, 4, 4)
    wanted = select(queries, keys, 4)
    queries[2, 1, : 4 if whole else 1] = bad
    keys[:, :, ::2] = keys[:, :, :1] if whole else keys[:, :, ::2]
    slots, _ = select(queries, keys, 4)
    assert slots.min() >= 0
    assert slots.max() < 16
    if not whole:
        good = torch.tensor([0, 1, 3, 4, 5])
        assert torch.equal(slots[good], wanted[0][good])


def test_scores_of_nan_beside_tied_infinite_ones_give_valid_slots() -> None:
    first, second = torch.zeros(2, 8)
    first[0], second[:2] = torch.inf, -torch.inf
    slots, _ = select(torch.ones(1, 1, 2), torch.stack((first, second)).view(1, 2, 8, 1), 7)
    assert slots.min() >= 0
    assert slots.max() < 64


def make(config: MemoryConfig = SMALL, seed: int = 3) -> ProductKeys:
    return ProductKeys(config, 10, Exchange.alone(), torch.Generator().manual_seed(seed))


def test_parameters_start_from_the_generator_alone() -> None:
    torch.manual_seed(0)
    one = make()
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.random.get_rng_state())
    two, other = make(), make(seed=4)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name
    assert not torch.equal(one.keys, other.keys)
    assert {name: tuple(p.shape) for name, p in one.named_parameters()} == {
        "query.weight": (12, 10), "query.bias": (12,), "norm.weight": (12,), "norm.bias": (12,), "keys": (2, 2, 8, 3),
    }  # fmt: skip
    assert one.keys.abs().max() <= 3**-0.5 < one.keys.abs().max() * 1.1
    assert one.query.weight.abs().max() <= 10**-0.5 < one.query.weight.abs().max() * 1.1
    rest = one.state_dict().keys() - {name for name, _ in one.named_parameters()}
    assert rest == {"norm.running_mean", "norm.running_var"}


@pytest.mark.parametrize("query_norm", [True, False])
def test_scores_are_of_the_normalised_queries(query_norm: bool) -> None:
    keys = make(dataclasses.replace(SMALL, query_norm=query_norm))
    x, mask = torch.randn(20, 10) + 2, torch.arange(20) < 15
    slots, scores = keys(x, mask)
    queries = keys.query(x)
    if query_norm:
        queries = (queries - queries[:15].mean(0)) / (queries[:15].var(0, unbiased=False) + 1e-5).sqrt()
    wanted = brute_force(queries.view(20, 2, 6), keys.keys, 4)
    assert torch.equal(slots, wanted[0])
    torch.testing.assert_close(scores, wanted[1], rtol=1e-5, atol=1e-5)
    _, dropped = keys(x, mask, lambda q: q * 0)
    assert dropped.eq(0).all()


@pytest.mark.parametrize(
    ("field", "value"), [("k", 9), ("k", 0), ("key_width", 7), ("key_width", 0), ("sub_keys", 50_000), ("heads", 0)]
)
def test_sizes_that_cannot_work(field: str, value: int) -> None:
    changes: dict[str, Any] = {field: value}
    with pytest.raises(DistlmError, match=rf"memory\.{field}={value}: "):
        make(dataclasses.replace(SMALL, **changes))
