"""NT-ASGD against torch's ASGD and by hand; the trigger's two rules."""

import pytest
import torch

from distlm.models.awd_lstm.nt_asgd import NTASGD, trigger_fires


def gradients(count: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, 2) for _ in range(count)]


def run(optimizer: torch.optim.Optimizer, weight: torch.Tensor, rates: list[float]) -> None:
    for rate, gradient in zip(rates, gradients(len(rates)), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        weight.grad = gradient.clone()
        optimizer.step()


RATES = [30 * length / 70 for length in (66, 35, 70, 75, 71, 31, 70)]


def test_before_the_trigger_it_is_sgd() -> None:
    ours, theirs = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    run(NTASGD([ours], 30, weight_decay=0.01), ours, RATES)
    run(torch.optim.SGD([theirs], 30, weight_decay=0.01), theirs, RATES)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("lag", [False, True])
def test_averages_are_those_of_torch_s_asgd(lag: bool) -> None:
    """torch's ASGD steps with the rate of the step before, but for its first step: our lag option."""
    ours, theirs = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    optimizer = NTASGD([ours], 30, weight_decay=0.01, reference_eta_lag=lag)
    optimizer.start_averaging()
    reference = torch.optim.ASGD([theirs], 30, t0=0, lambd=0, weight_decay=0.01)
    run(optimizer, ours, RATES)
    if lag:
        run(reference, theirs, RATES)
    else:
        for rate, gradient in zip(RATES, gradients(len(RATES)), strict=True):
            theirs.grad = gradient.clone()
            if reference.state:
                reference.state[theirs]["eta"].fill_(rate)
            reference.param_groups[0]["lr"] = rate
            reference.step()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(optimizer.state[ours]["ax"], reference.state[theirs]["ax"])


def test_with_its_first_term_the_average_is_that_of_algorithm_1() -> None:
    """Σ w_i / (k − T + 1) over i = T … k, w_T the weights at the trigger."""
    weight = torch.full((1,), 3.0, requires_grad=True)
    optimizer = NTASGD([weight], 1.0, first_term=True)
    optimizer.start_averaging()
    path = [3.0]
    for step in range(1, 6):
        weight.grad = torch.full((1,), -float(step))
        optimizer.step()
        path.append(weight.item())
        assert float(optimizer.state[weight]["ax"]) == pytest.approx(sum(path) / len(path), rel=1e-6)


def test_the_average_leaves_out_the_first_weights() -> None:
    weight = torch.zeros(1, requires_grad=True)
    optimizer = NTASGD([weight], 1.0)
    optimizer.start_averaging()
    assert float(optimizer.state[weight]["ax"]) == 0
    path = []
    for step in range(1, 6):
        weight.grad = torch.full((1,), -float(step))
        optimizer.step()
        path.append(float(weight))
        expected = path[0] if step == 1 else sum(path[1:]) / (step - 1)
        assert float(optimizer.state[weight]["ax"]) == pytest.approx(expected)
    assert path == [1, 3, 6, 10, 15], "the weights themselves go on as in SGD"


def test_averaging_anew_forgets() -> None:
    weight = torch.zeros(1, requires_grad=True)
    optimizer = NTASGD([weight], 1.0)
    for _ in range(2):
        optimizer.start_averaging()
        for _ in range(3):
            weight.grad = torch.ones(1)
            optimizer.step()
    assert float(optimizer.state[weight]["ax"]) == pytest.approx((-5 - 6) / 2)
    assert optimizer.param_groups[0]["averaged"] == 3


def first_epoch(losses: list[float], rule: str, nonmono: int) -> int | None:
    """1-based epoch in which the trigger fires."""
    for epoch, loss in enumerate(losses, 1):
        if trigger_fires(losses[: epoch - 1], loss, rule, nonmono):  # type: ignore[arg-type]
            return epoch
    return None


def test_rules_of_the_trigger_by_hand() -> None:
    assert first_epoch([5, 6, 7, 8, 9, 10, 11], "masked", 5) == 7, "the earliest there can be with n = 5"
    assert first_epoch([5, 6, 7, 8, 9, 10, 11], "window", 5) == 7
    # Falls, then a plateau above its least: the window sees that at once, the mask only once the least is n back.
    plateau = [9, 8, 7, 6, 5, 5.5, 5.4, 5.4, 5.4, 5.4, 5.4, 5.4]
    assert first_epoch(plateau, "window", 5) == 7
    assert first_epoch(plateau, "masked", 5) == 11
    assert first_epoch([float(9 - epoch) for epoch in range(9)], "masked", 2) is None
    assert not trigger_fires([3.0, 3.0], 3.0, "masked", 1), "equal is not worse"
