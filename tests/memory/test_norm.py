"""The query norm on one rank against torch.nn.BatchNorm1d of the unmasked tokens."""

import pytest
import torch
from support.present import present
from torch import Tensor, nn

from distlm.memory import norm as norm_module
from distlm.memory.norm import QueryNorm
from distlm.memory.values.exchange import Exchange

CHANNELS = 6


def make(momentum: float = 0.1, dtype: torch.dtype = torch.float32) -> tuple[QueryNorm, nn.BatchNorm1d]:
    mine = QueryNorm(CHANNELS, momentum, Exchange.alone()).to(dtype)
    torchs = nn.BatchNorm1d(CHANNELS, momentum=momentum).to(dtype)
    with torch.no_grad():
        mine.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        mine.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    torchs.weight.data.copy_(mine.weight.data)
    torchs.bias.data.copy_(mine.bias.data)
    return mine, torchs


def batch(tokens: int = 40, masked: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, CHANNELS, generator=generator) * torch.arange(1, CHANNELS + 1) + 3
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[torch.randperm(tokens, generator=generator)[:masked]] = False
    return x, mask


@pytest.mark.parametrize("masked", [0, 9])
@pytest.mark.parametrize("rows_at_a_time", [10_000, 7])
def test_batch_norm_of_the_unmasked_tokens(monkeypatch: pytest.MonkeyPatch, masked: int, rows_at_a_time: int) -> None:
    monkeypatch.setitem(norm_module._CHUNK, "cpu", rows_at_a_time * CHANNELS)
    mine, torchs = make(momentum=0.3)
    for step in range(3):
        x, mask = batch(masked=masked, seed=step)
        upstream = torch.randn_like(x) * mask[:, None]
        a, b = x.clone().requires_grad_(), x[mask].requires_grad_()
        out, wanted = mine(a, mask), torchs(b)
        torch.testing.assert_close(out[mask], wanted, rtol=1e-6, atol=1e-6)
        out.backward(upstream)
        wanted.backward(upstream[mask])
        torch.testing.assert_close(present(a.grad)[mask], b.grad, rtol=1e-5, atol=1e-6)
        assert present(a.grad)[~mask].eq(0).all()
        for name in ("weight", "bias"):
            torch.testing.assert_close(getattr(mine, name).grad, getattr(torchs, name).grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.running_mean, torchs.running_mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(mine.running_var, torchs.running_var, rtol=1e-6, atol=1e-7)
    x, mask = batch(seed=9)
    torch.testing.assert_close(mine.eval()(x, mask), torchs.eval()(x), rtol=1e-6, atol=1e-6)


def test_masked_tokens_are_normalised_and_change_nothing() -> None:
    x, mask = batch()
    mine, _ = make()
    out = mine(x, mask)
    statistics = mine.running_mean.clone(), mine.running_var.clone()
    mean, std = x[mask].mean(0), x[mask].var(0, unbiased=False).add(1e-5).sqrt()
    torch.testing.assert_close(out[~mask], (x[~mask] - mean) / std * mine.weight + mine.bias, rtol=1e-5, atol=1e-5)
    for rubbish in (1e30, float("inf"), float("nan")):
        other, _ = make()
        spoilt = torch.where(mask[:, None], x, rubbish)
        assert torch.equal(other(spoilt, mask)[mask], out[mask])
        assert torch.equal(other.running_mean, statistics[0])
        assert torch.equal(other.running_var, statistics[1])


def test_gradient_is_that_of_the_function_with_gradients_on_masked_outputs_too() -> None:
    mine, _ = make(dtype=torch.float64)
    x, mask = batch(tokens=8, masked=3)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(mine, {"weight": weight, "bias": bias}, (x, mask))

    inputs = (x.double().requires_grad_(), mine.weight.detach().clone().requires_grad_(), mine.bias.detach().clone())
    assert torch.autograd.gradcheck(function, (*inputs[:2], inputs[2].requires_grad_()))


@pytest.mark.parametrize("unmasked", [0, 1])
def test_too_few_tokens_for_statistics_take_the_running_ones(unmasked: int) -> None:
    mine, torchs = make()
    for module in (mine, torchs):
        present(module.running_mean).fill_(2.0)
        present(module.running_var).fill_(4.0)
    x, mask = batch(tokens=5, masked=5 - unmasked)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = mine(a, mask), torchs.eval()(b)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(x)
    out.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.weight.grad, torchs.weight.grad, rtol=1e-6, atol=1e-6)
    assert mine.running_mean.eq(2).all()
    assert mine.running_var.eq(4).all()


def test_an_overflow_does_not_stay_in_the_running_statistics() -> None:
    mine, _ = make()
    x, mask = batch(masked=0)
    mine(x, mask)
    before = mine.running_mean.clone(), mine.running_var.clone()
    x[3, 2] = float("inf")
    mine(x, mask)
    assert torch.equal(mine.running_mean, before[0])
    assert torch.equal(mine.running_var, before[1])


def test_variance_beside_a_large_mean() -> None:
    """Σx² − (Σx)²/n in fp32 would be off by 100 % here, and the mean of fp32 sums by some standard deviations."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20_000, CHANNELS, generator=generator) + 1e4
    mine, _ = make(momentum=1.0)
    out = mine(x, torch.ones(len(x), dtype=torch.bool))
    exact = x.double()
    torch.testing.assert_close(mine.running_var, exact.var(0).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(mine.running_mean, exact.mean(0).float(), rtol=1e-7, atol=0)
    wanted = (exact - exact.mean(0)) / exact.std(0, unbiased=False) * mine.weight + mine.bias
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=3e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fp32_inside(dtype: torch.dtype) -> None:
    mine, _ = make()
    mine = mine.to(dtype)
    assert mine.weight.dtype == dtype
    assert mine.running_mean.dtype == mine.running_var.dtype == torch.float32
    x, mask = batch()
    x = x.to(dtype).requires_grad_()
    out = mine(x, mask)
    reference, _ = make()
    reference.weight.data.copy_(mine.weight.data)
    reference.bias.data.copy_(mine.bias.data)
    torch.testing.assert_close(out, reference(x.detach().float(), mask), rtol=1e-6, atol=1e-6)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert present(x.grad).dtype == present(mine.weight.grad).dtype == dtype
    assert mine.eval()(x, mask).dtype == torch.float32
