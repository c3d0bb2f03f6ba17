"""The chunked softmax against the plain one: values, gradients, and that no more than a chunk is ever held."""

import pytest
import torch
import torch.nn.functional as F
from support.present import present

from distlm.models import linear_cross_entropy
from distlm.models.linear_cross_entropy import chunk_rows, cross_entropy_sum, target_log_probs


def case(rows: int = 23, words: int = 40, width: int = 6) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    tensors = [torch.randn(rows, width) * 3, torch.randn(words, width), torch.randn(words)]
    return *(tensor.requires_grad_() for tensor in tensors), torch.randint(0, words, (rows,))


@pytest.mark.parametrize("rows", [1, 5, 23, 100])
def test_sum_and_gradients_are_those_of_cross_entropy(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK", {"cpu": 40 * rows})
    *tensors, targets = case()
    hidden, weight, bias = tensors
    ours = cross_entropy_sum(hidden, weight, bias, targets)
    (ours * 0.25).backward()
    mine = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    plain = F.cross_entropy(hidden @ weight.t() + bias, targets, reduction="sum")
    (plain * 0.25).backward()
    assert float(ours) == pytest.approx(float(plain), rel=1e-6)
    for found, tensor in zip(mine, tensors, strict=True):
        torch.testing.assert_close(found, tensor.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert float(cross_entropy_sum(hidden, weight, bias, targets)) == pytest.approx(float(plain), rel=1e-6)
    expected = F.log_softmax(hidden @ weight.t() + bias, 1)[torch.arange(23), targets]
    torch.testing.assert_close(target_log_probs(hidden, weight, bias, targets), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_softmax_of_fp32(dtype: torch.dtype) -> None:
    """Of the logits as they are in half precision, in training and without gradients: a log norm of 9 has steps of 0.06
    in bf16."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 16).to(dtype), torch.randn(4000, 16).to(dtype) / 4
    bias, targets = torch.randn(4000).to(dtype), torch.randint(0, 4000, (64,))
    logits = torch.addmm(bias, hidden, weight.t()).float()
    exact = F.log_softmax(logits.double(), 1)[torch.arange(64), targets]
    found = target_log_probs(hidden, weight, bias, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    total = cross_entropy_sum(hidden, weight, bias, targets)
    assert float(total.detach()) == pytest.approx(-float(exact.sum()), rel=1e-6)
    total.backward()
    derived = torch.softmax(logits, 1) - F.one_hot(targets, 4000)
    torch.testing.assert_close(present(bias.grad).float(), derived.sum(0), rtol=2e-2, atol=2e-3)


def test_very_likely_and_very_unlikely_words_stay_finite() -> None:
    hidden, weight = torch.tensor([[200.0], [200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    total = cross_entropy_sum(hidden, weight, torch.zeros(2), torch.tensor([0, 1]))
    assert float(total) == pytest.approx(400)
    total.backward()
    assert bool(present(hidden.grad).isfinite().all())


def test_chunks_are_bounded() -> None:
    assert chunk_rows(33278, torch.device("cpu")) * 33278 * 4 <= 64 << 20
    assert chunk_rows(1 << 30, torch.device("cpu")) == 1
