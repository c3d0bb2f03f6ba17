"""Learning-rate schedules."""

import dataclasses
import math

import pytest

from distlm.config.training import UpdatesConfig
from distlm.errors import DistlmError
from distlm.optim.schedule import learning_rate

SMALL = UpdatesConfig(lr=0.4, min_lr=0.01, warmup_updates=10, warmup_init_lr=0.0, cosine_period=20)


def closed_form(config: UpdatesConfig, update: int) -> float:
    """fairseq's cosine: cycle number by logarithm."""
    u, period, t = update - config.warmup_updates, config.cosine_period, config.cosine_t_mult
    if t == 1:
        i, length, position = u // period, float(period), float(u % period)
    else:
        # The nudge keeps the logarithm of an exact cycle boundary on its upper side.
        i = math.floor(math.log(1 - u / period * (1 - t), t) + 1e-9)
        length, position = t**i * period, u - (1 - t**i) / (1 - t) * period
    shrink = config.cosine_shrink**i
    low, high = config.min_lr * shrink, config.lr * shrink
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * position / length))


@pytest.mark.parametrize("t_mult", [1.0, 1.5, 2.0, 3.0])
def test_cosine_is_fairseqs_closed_form(t_mult: float) -> None:
    config = dataclasses.replace(SMALL, cosine_t_mult=t_mult)
    for update in range(10, 700):
        assert learning_rate(config, update) == pytest.approx(closed_form(config, update), rel=1e-9), update


def test_restarts_at_the_shrunk_peak() -> None:
    assert learning_rate(SMALL, 10) == pytest.approx(0.4)
    assert learning_rate(SMALL, 30) == pytest.approx(0.4 * 0.75)
    assert learning_rate(SMALL, 70) == pytest.approx(0.4 * 0.75**2)
    assert learning_rate(SMALL, 69) == pytest.approx(0.01 * 0.75, rel=0.2)


def test_warm_up_is_linear_and_joins_each_schedule() -> None:
    for schedule in ("cosine", "inverse_sqrt", "linear", "constant"):
        config = dataclasses.replace(SMALL, schedule=schedule, warmup_init_lr=0.1)
        assert learning_rate(config, 0) == 0.1
        assert learning_rate(config, 5) == pytest.approx(0.25)
        assert learning_rate(config, 10) == pytest.approx(0.4)


def test_inverse_sqrt_and_constant() -> None:
    config = dataclasses.replace(SMALL, schedule="inverse_sqrt")
    assert learning_rate(config, 40) == pytest.approx(0.2)
    assert learning_rate(dataclasses.replace(config, warmup_updates=0), 0) == pytest.approx(0.4)
    assert learning_rate(dataclasses.replace(SMALL, schedule="constant"), 10**6) == 0.4


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(dataclasses.replace(SMALL, warmup_updates=0), 0) == pytest.approx(0.4)


@pytest.mark.parametrize("change", [{"cosine_period": 0}, {"cosine_t_mult": 0.5}])
def test_cycles_without_length_are_refused(change: dict) -> None:
    with pytest.raises(DistlmError, match=r"train\.cosine_period=.*at least 1"):
        learning_rate(dataclasses.replace(SMALL, **change), 100)


def test_linear_ends_at_the_last_update() -> None:
    config = dataclasses.replace(SMALL, schedule="linear", updates=SMALL.warmup_updates + 100, min_lr=0.1)
    rates = [learning_rate(config, SMALL.warmup_updates + done) for done in (0, 50, 100, 1000)]
    assert rates == pytest.approx([0.4, 0.25, 0.1, 0.1])
