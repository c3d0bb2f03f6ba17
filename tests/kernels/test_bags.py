"""Weighted sums of rows and the derivatives of their weights, against the same in fp64."""

import pytest
import torch
from support.kernels import DEVICE, FLOATS, taking
from support.memory import backward, make_table, reads
from torch import Tensor

from distlm.kernels import bags, choice
from distlm.memory import lookup


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def whole(end: int, *shape: int) -> Tensor:
    return torch.randint(end, shape, generator=torch.Generator().manual_seed(1)).int().to(DEVICE)


def ragged(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("width", "count"), [(1, 3), (7, 1), (20, 17), (300, 9)])
def test_sums_and_derivatives(dtype: torch.dtype, width: int, count: int) -> None:
    table, slots, weights = normal(11, width, dtype=dtype), whole(11, 3, count), normal(3, count, seed=2)
    gradient = normal(3, width, seed=3, dtype=dtype)
    rows = table.double()[slots.long()]
    sums = bags.token_sums(table, slots, weights)
    torch.testing.assert_close(sums.double(), (weights.double()[..., None] * rows).sum(1), rtol=1e-5, atol=1e-5)
    products = bags.score_gradients(table, slots, gradient)
    wanted = (rows * gradient.double()[:, None]).sum(2)
    torch.testing.assert_close(products.double(), wanted, rtol=1e-5, atol=2e-5)
    assert sums.dtype == products.dtype == torch.float32
    # The same bits again: there are no atomics.
    assert torch.equal(sums, bags.token_sums(table, slots, weights))
    assert torch.equal(products, bags.score_gradients(table, slots, gradient))


def test_bags_of_any_length() -> None:
    """Empty ones at the start, in the middle and at the end, of one entry, of many; all entries of one row."""
    offsets = ragged([0, 1, 0, 19, 8, 0])
    source, index, weights = normal(6, 5), whole(6, 28), normal(28, seed=4)
    index[9:] = 2
    found = bags.bag_sums(source, index, offsets, weights)
    torch.testing.assert_close(found, lookup.bag_sums(source, index, offsets, weights), rtol=1e-5, atol=1e-6)
    assert found[[0, 2, 5]].eq(0).all() and found[[1, 3, 4]].ne(0).all()


def test_a_row_that_is_not_read_has_no_say() -> None:
    source, index = normal(4, 5), torch.tensor([0, 2, 0, 2]).int().to(DEVICE)
    source[[1, 3]] = torch.nan
    found = bags.bag_sums(source, index, ragged([3, 1]), normal(4, seed=1))
    assert found.isfinite().all()


def test_a_sum_that_is_taken_early_goes_on_with_the_same_bits() -> None:
    source, index, weights = normal(9, 5), whole(9, 14), normal(14, seed=4)
    whole_sum = bags.bag_sums(source, index, ragged([14]), weights)
    early = bags.bag_sums(source, index[:5], ragged([5]), weights[:5])
    rest = torch.cat([torch.tensor([9]).int().to(DEVICE), index[5:]])
    later = torch.cat([torch.ones(1, device=DEVICE), weights[5:]])
    assert torch.equal(bags.bag_sums(torch.cat([source, early]), rest, ragged([10]), later), whole_sum)


def test_columns_have_their_own_bits() -> None:
    """What N ranks, with columns each, compute is what one computes."""
    source, index, weights, offsets = normal(9, 300), whole(9, 11), normal(11, seed=4), ragged([4, 7])
    all_columns = bags.bag_sums(source, index, offsets, weights)
    for first, last in ((0, 10), (10, 267), (267, 300)):
        some = bags.bag_sums(source[:, first:last].contiguous(), index, offsets, weights)
        assert torch.equal(some, all_columns[:, first:last])


def test_nothing_to_read() -> None:
    table = normal(5, 4)
    for tokens, count in ((0, 3), (2, 0)):
        slots, weights = whole(5, tokens, count), normal(tokens, count)
        assert torch.equal(bags.token_sums(table, slots, weights), torch.zeros(tokens, 4, device=DEVICE))
        assert bags.score_gradients(table, slots, normal(tokens, 4)).shape == (tokens, count)
    assert bags.bag_sums(table, whole(5, 0), ragged([]), normal(0)).shape == (0, 4)


@pytest.mark.parametrize("operation", ["lookup", "weights"])
def test_a_table_uses_them(operation: choice.Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table's forward and backward, stale slots included, give what torch gives."""
    given = reads(1, tokens=3)
    wanted = backward(make_table(), given)
    called: list[str] = []
    names = {"lookup": "token_sums", "weights": "score_gradients"}
    original = getattr(bags, names[operation])

    def seen(*arguments: Tensor) -> Tensor:
        called.append(operation)
        found: Tensor = original(*arguments)
        return found

    monkeypatch.setattr(bags, names[operation], seen)
    taking(monkeypatch, operation)
    table = make_table().to(DEVICE)
    given.slots, given.weights, given.upstream = (x.to(DEVICE) for x in (given.slots, given.weights, given.upstream))
    for mine, theirs in zip(backward(table, given), wanted, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-6)
    assert called
