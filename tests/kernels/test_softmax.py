"""Cross-entropy by the kernels against torch's in fp64: values and gradients, of the functions that use them, too."""

import pytest
import torch
import torch.nn.functional as F
from support.kernels import DEVICE, FLOATS, taking
from torch import Tensor

from distlm.kernels import softmax
from distlm.models import linear_cross_entropy
from distlm.models.linear_cross_entropy import cross_entropy_sum, linear_log_probs, target_log_probs
from distlm.models.transformer.adaptive import AdaptiveInput, AdaptiveSoftmax, Bands

SHARE = {torch.float32: 1e-5, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-6}


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within the precision of the largest number."""
    share = SHARE[dtype]
    scale = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(found.double(), wanted.double(), rtol=share, atol=share * scale + 1e-7)


def case(rows: int, classes: int, width: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden, weight, bias, all to be differentiated, and targets."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, width), (classes, width), (classes,)]
    given = [torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    return [*given, torch.randint(classes, (rows,), generator=generator).to(DEVICE)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", [1, 5, 4097])
def test_rows_of_logits(dtype: torch.dtype, classes: int) -> None:
    """One class, no power of two, more than a block."""
    generator = torch.Generator().manual_seed(classes)
    logits = (torch.randn(3, classes, generator=generator) * 3).to(DEVICE, dtype)
    targets = torch.tensor([0, classes - 1, classes // 2]).to(DEVICE)
    full = logits.double().log_softmax(1)
    wanted = full.gather(1, targets[:, None]).squeeze(1)
    derived = full.exp() - F.one_hot(targets, classes)
    kept = logits.clone()
    found, norms = softmax.log_probs(logits, targets)
    assert torch.equal(logits, kept)
    close(found, wanted)
    close(norms, logits.double().logsumexp(1))
    again, _ = softmax.log_probs(logits, targets, derive=True)
    assert torch.equal(found, again)
    close(logits, derived, dtype)
    factors = torch.tensor([-1.0, 0.0, 2.5]).to(DEVICE)
    softmax.derive_(kept, targets, norms, factors)
    close(kept, derived * factors[:, None], dtype)


def test_very_likely_and_very_unlikely_classes_stay_finite() -> None:
    logits = torch.tensor([[200.0, -200.0], [200.0, -200.0], [-3e38, -3e38]]).to(DEVICE)
    targets = torch.tensor([0, 1, 1]).to(DEVICE)
    found, _ = softmax.log_probs(logits, targets, derive=True)
    assert found[:2].tolist() == [0.0, -400.0] and logits.isfinite().all() and found.isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_target_that_is_no_class_gives_nan(wrong: int) -> None:
    logits = torch.zeros(2, 4).to(DEVICE)
    found, _ = softmax.log_probs(logits, torch.tensor([wrong, 1]).to(DEVICE))
    assert found[0].isnan() and found[1].isfinite()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "chunk"), [(5, 100), (5, 2), (1, 1), (0, 2)])
def test_linear_log_probs(dtype: torch.dtype, rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has a weight of its own; all rows at once, two at a time, and none."""
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK", {DEVICE.type: 11 * chunk})
    hidden, weight, _, targets = case(rows, 11, dtype=dtype)
    factors = torch.linspace(-1, 2, rows).to(DEVICE)
    taking(monkeypatch, "log_probs")
    found = linear_log_probs(hidden, weight, targets)
    gradients = torch.autograd.grad((found * factors).sum(), (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = (exact[0] @ exact[1].t()).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    assert found.dtype == torch.float32 and [x.dtype for x in gradients] == [dtype, dtype]
    close(found, wanted, dtype)
    for mine, theirs in zip(gradients, torch.autograd.grad((wanted * factors).sum(), exact), strict=True):
        close(mine, theirs, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cross_entropy_sum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK", {DEVICE.type: 22})
    hidden, weight, bias, targets = case(5, 11, dtype=dtype)
    taking(monkeypatch, "cross_entropy")
    found = cross_entropy_sum(hidden, weight, bias, targets)
    gradients = torch.autograd.grad(0.25 * found, (hidden, weight, bias))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    wanted = F.cross_entropy(exact[0] @ exact[1].t() + exact[2], targets, reduction="sum")
    close(found, wanted, dtype)
    for mine, theirs in zip(gradients, torch.autograd.grad(0.25 * wanted, exact), strict=True):
        close(mine, theirs, dtype)
    with torch.no_grad():
        close(-target_log_probs(hidden, weight, bias, targets).sum(), wanted, dtype)
        close(cross_entropy_sum(hidden, weight, bias, targets), wanted, dtype)


def test_adaptive_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """A band without words gives its parameters a gradient of zeros, as ZeRO wants it."""
    torch.manual_seed(0)
    layer = AdaptiveSoftmax(AdaptiveInput(Bands.plan(60, [16, 30], 24, 2), 24), 0.0).to(DEVICE)
    hidden, targets = torch.randn(4, 24).to(DEVICE), torch.tensor([3, 17, 15, 29]).to(DEVICE)
    found = []
    for operations in ((), ("log_probs",)):
        taking(monkeypatch, *operations)
        layer.zero_grad()
        log_probs = layer(hidden, targets)
        log_probs.sum().backward()
        found.append([log_probs.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 1 + len(list(layer.parameters()))
    for mine, theirs in zip(found[1], found[0], strict=True):
        close(mine, theirs)


def test_fp64_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = case(2, 5, dtype=torch.float64)
    for name in ("log_probs", "derive_"):
        monkeypatch.setattr(softmax, name, None)
    taking(monkeypatch, "log_probs", "cross_entropy")
    linear_log_probs(hidden, weight, targets).sum().backward()
    cross_entropy_sum(hidden, weight, bias, targets).backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
