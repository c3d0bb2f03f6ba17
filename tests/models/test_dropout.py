"""Dropout and causal attention on a CPU against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from support.present import present

from distlm.models.dropout import causal_attention, dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.95])
def test_rate_and_expectation(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 999)
    out = dropout(x, p, True)
    assert out.eq(0).float().mean().item() == pytest.approx(p, abs=2e-3)
    assert out[out > 0].unique().numel() == 1
    assert out.max().item() == pytest.approx(1 / (1 - p), rel=2e-4)
    assert out.mean().item() == pytest.approx(1, abs=3e-3 / (1 - p) ** 0.5)


def test_elements_are_independent() -> None:
    torch.manual_seed(0)
    kept = dropout(torch.ones(1 << 18), 0.5, True).ne(0).float() - 0.5
    for lag in (1, 2, 3, 4, 5, 8, 1024):
        assert abs((kept[:-lag] * kept[lag:]).mean().item() * 4) < 0.01, lag


def test_seeded_and_off_where_it_should_be() -> None:
    x = torch.randn(5, 7)
    torch.manual_seed(4)
    first, second = dropout(x, 0.5, True), dropout(x, 0.5, True)
    torch.manual_seed(4)
    assert torch.equal(first, dropout(x, 0.5, True))
    assert not torch.equal(first, second)
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x
    assert torch.equal(dropout(x, 1e-7, True), x)
    assert dropout(x[:0], 0.5, True).shape == (0, 7)


def test_gradient_goes_through_the_same_elements() -> None:
    x = torch.randn(50, 50, requires_grad=True)
    out = dropout(x, 0.4, True)
    out.sum().backward()
    assert torch.equal(present(x.grad).eq(0), out.eq(0))
    torch.testing.assert_close(present(x.grad) * x, out)


def test_attention_with_dropout_is_torchs_when_nothing_is_dropped() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 17, 8, requires_grad=True) for _ in range(3))
    # So small a rate drops nothing, and takes the path of training.
    mine = causal_attention(q, k, v, 1e-9)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(mine, expected)
    gradients = torch.autograd.grad(mine.pow(2).sum(), (q, k, v))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.pow(2).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-4)


def test_attention_dropout_drops_weights_not_positions_after() -> None:
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 4, 8)
    v = torch.eye(4, 8).view(1, 1, 4, 8)
    rows = torch.cat([causal_attention(q, k, v, 0.25)[0, 0, :, :4] for _ in range(4000)]).view(-1, 4, 4)
    assert rows.triu(1).eq(0).all()
    assert rows[:, 3].eq(0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(rows.mean(0), torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None], atol=0.03, rtol=0)
