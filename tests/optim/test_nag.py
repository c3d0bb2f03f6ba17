"""NAG against fairseq's update written out, across changing rates, partial steps and a restart."""

import copy
from collections.abc import Sequence

import pytest
import torch

from distlm.optim.nag import NAG

RATES = [1e-7, 0.1, 0.5, 1.0, 1.0, 0.3, 0.02, 0.75]


def fairseq(start: torch.Tensor, grads: Sequence[torch.Tensor], rates: Sequence[float], m: float, decay: float = 0.0):
    """p after every step, and the last buffer: the update of fairseq's nag.py."""
    p, buf, lr_old, trace = start.clone(), torch.zeros_like(start), rates[0], []
    for g, lr in zip(grads, rates, strict=True):
        c = lr / lr_old
        p = p * (1 - lr * decay)
        p, buf, lr_old = p + m * m * c * buf - (1 + m) * lr * g, m * c * buf - lr * g, lr
        trace.append(p)
    return trace, buf


def gradients(count: int, size: int = 9) -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [torch.randn(size, dtype=torch.float64) for _ in range(count)]


def run(optimizer: torch.optim.Optimizer, p: torch.Tensor, grads: Sequence[torch.Tensor], rates: Sequence[float]):
    trace = []
    for g, lr in zip(grads, rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = g.clone()
        optimizer.step()
        trace.append(p.detach().clone())
    return trace


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_is_fairseqs_update(momentum: float, decay: float) -> None:
    grads = gradients(len(RATES))
    p = torch.nn.Parameter(torch.randn(9, dtype=torch.float64))
    expected, buf = fairseq(p.detach(), grads, RATES, momentum, decay)
    optimizer = NAG([p], lr=RATES[0], momentum=momentum, weight_decay=decay)
    for mine, theirs in zip(run(optimizer, p, grads, RATES), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-13, rtol=1e-11)
    # The recorded rate turns the velocity into fairseq's buffer.
    group, state = optimizer.param_groups[0], optimizer.state[p]
    assert group["lr_old"] == RATES[-1]
    torch.testing.assert_close(group["lr_old"] * state["momentum_buffer"], buf, atol=1e-13, rtol=1e-11)


def test_the_correction_by_the_old_rate_matters() -> None:
    """Without it (c = 1) the drop from 1.0 to 0.3 would keep moving at the old speed."""
    grads = gradients(len(RATES))
    p = torch.nn.Parameter(torch.zeros(9, dtype=torch.float64))
    mine = run(NAG([p], lr=RATES[0]), p, grads, RATES)[-1]
    uncorrected, buf, m = torch.zeros(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64), 0.99
    for g, lr in zip(grads, RATES, strict=True):
        uncorrected, buf = uncorrected + m * m * buf - (1 + m) * lr * g, m * buf - lr * g
    assert (mine - uncorrected).abs().max() > 0.1


def test_is_torchs_nesterov_momentum() -> None:
    """torch's SGD keeps the velocity without the rate, so the two agree at any schedule."""
    grads = gradients(len(RATES))
    start = torch.randn(9, dtype=torch.float64)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = run(NAG([p], lr=1.0, momentum=0.99), p, grads, RATES)
    theirs = run(torch.optim.SGD([q], lr=1.0, momentum=0.99, nesterov=True), q, grads, RATES)
    torch.testing.assert_close(mine[-1], theirs[-1], atol=1e-13, rtol=1e-12)


def test_steps_of_parts_are_one_step() -> None:
    """ZeRO-3 steps each sub-group by itself, under the same parameter group: the old rate must serve them all."""
    grads = gradients(len(RATES))
    whole = torch.nn.Parameter(torch.zeros(9, dtype=torch.float64))
    expected = run(NAG([whole], lr=RATES[0]), whole, grads, RATES)[-1]
    parts = [torch.nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in (4, 5)]
    optimizer = NAG(parts, lr=RATES[0])
    for g, lr in zip(grads, RATES, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for part, piece in zip(parts, g.split([4, 5]), strict=True):
            part.grad = piece.clone()
            optimizer.param_groups[0]["params"] = [part]
            optimizer.step()
    assert torch.equal(torch.cat([part.detach() for part in parts]), expected)


def test_resumes_bit_for_bit_from_its_state() -> None:
    grads = [g.float() for g in gradients(len(RATES))]
    p = torch.nn.Parameter(torch.ones(9))
    optimizer = NAG([p], lr=RATES[0], weight_decay=0.01)
    run(optimizer, p, grads[:4], RATES[:4])
    q = torch.nn.Parameter(p.detach().clone())
    restored = NAG([q], lr=0.123)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert restored.param_groups[0]["lr_old"] == RATES[3]
    expected = run(optimizer, p, grads[4:], RATES[4:])
    assert torch.equal(run(restored, q, grads[4:], RATES[4:])[-1], expected[-1])


def test_a_rate_of_zero_moves_nothing_and_forgets_nothing() -> None:
    grads = gradients(5)
    p = torch.nn.Parameter(torch.ones(9, dtype=torch.float64))
    optimizer = NAG([p], lr=0.0)
    trace = run(optimizer, p, grads, [0.0, 0.1, 0.0, 0.1, 0.0])
    assert torch.equal(trace[0], torch.ones(9, dtype=torch.float64))
    assert torch.equal(trace[2], trace[1])
    assert torch.equal(trace[4], trace[3])
    assert trace[3].isfinite().all()
    assert not torch.equal(trace[3], trace[2])


def test_parameters_without_gradient_stay() -> None:
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = NAG([used, unused], lr=0.1, weight_decay=0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    assert unused.eq(1).all()
    assert used.ne(1).all()
    assert unused not in optimizer.state


def test_closure_is_evaluated_with_gradients() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = NAG([p], lr=0.1, momentum=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.pow(2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert p.item() == pytest.approx(2 - 0.1 * 4)


def test_minimises_a_quadratic() -> None:
    p = torch.nn.Parameter(torch.tensor([5.0, -3.0]))
    optimizer = NAG([p], lr=0.05, momentum=0.9)
    scale = torch.tensor([1.0, 10.0])
    for _ in range(200):
        p.grad = scale * p.detach()
        optimizer.step()
    assert p.abs().max().item() < 1e-3
