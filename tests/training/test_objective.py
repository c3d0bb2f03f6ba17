"""The objective: cross-entropy and Ton et al.'s penalty against hand-computed values, and ω = 0 as plain training."""

import pytest
import torch
from torch import Tensor

from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import TransformerLM
from distlm.training.objective import TrainModule

VOCABULARY = 50
CONFIG = TransformerConfig(
    layers=2, width=16, heads=2, ffn_width=32, cutoffs=[10, 30], dropout=0.1, attention_dropout=0.1,
    activation_dropout=0.1, softmax_dropout=0.1, max_positions=16,
)  # fmt: skip


def fresh() -> TransformerLM:
    torch.manual_seed(7)
    return TransformerLM(CONFIG, VOCABULARY)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """inputs, targets: int64 [3, 8]."""
    words = torch.randint(4, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(seed))
    return words[:, :-1], words[:, 1:]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("some", [False, True])
@torch.no_grad()
def test_sums_and_loss_by_hand(reduction: str, some: bool) -> None:
    model = fresh().eval()
    module = TrainModule(model, "last_ffn_input", 0.5, reduction)
    inputs, targets = batch(0)
    scored = torch.ones(3, 8, dtype=torch.bool)
    scored[1, 5:] = False
    sums = module(inputs, targets, scored if some else None)
    output = model(inputs, tap="last_ffn_input")
    ce = penalty = norm = 0.0
    for row in range(3):
        for place in range(8):
            if some and not scored[row, place]:
                continue
            log_probs = model.full_log_probs(output.hidden[row, place][None])[0]
            state = output.tapped[row, place].double()
            ce -= float(log_probs[targets[row, place]])
            penalty += float((state * state).sum()) / (CONFIG.width if reduction == "mean" else 1)
            norm += float((state * state).sum()) ** 0.5
    assert float(sums.ce) == pytest.approx(ce, rel=1e-6)
    assert float(sums.penalty) == pytest.approx(penalty, rel=1e-6)
    assert float(sums.norm) == pytest.approx(norm, rel=1e-6)
    assert float(module.loss(sums, 0.25)) == pytest.approx(0.25 * (ce + 0.5 * penalty), rel=1e-6)


@torch.no_grad()
def test_other_taps_are_penalised() -> None:
    inputs, targets = batch(0)
    values = {
        tap: float(TrainModule(fresh().eval(), tap, 1.0, "mean")(inputs, targets).penalty)
        for tap in ("last_ffn_input", "last_attention_input", "output")
    }
    assert len({round(value, 3) for value in values.values()}) >= 2


def train(weight: float | None) -> dict[str, Tensor]:
    """Three steps with dropout; `None` is plain training, written out without TrainModule."""
    model = fresh()
    module = TrainModule(model, "last_ffn_input", weight or 0.0, "mean")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        inputs, targets = batch(step)
        torch.manual_seed(step)
        if weight is None:
            hidden = model(inputs).hidden
            assert hidden is not None
            loss = -model.log_probs(hidden.flatten(0, 1), targets.flatten()).sum(dtype=torch.float64)
            loss = (loss / 24).float()
        else:
            loss = module.loss(module(inputs, targets), 1 / 24)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def test_weight_zero_is_plain_training_bit_for_bit() -> None:
    plain, zero, some = train(None), train(0.0), train(0.1)
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    assert not all(torch.equal(plain[name], some[name]) for name in plain)


def test_weight_zero_builds_no_graph_for_the_penalty() -> None:
    inputs, targets = batch(0)
    assert not TrainModule(fresh(), "last_ffn_input", 0.0, "mean")(inputs, targets).penalty.requires_grad
    assert TrainModule(fresh(), "last_ffn_input", 0.1, "mean")(inputs, targets).penalty.requires_grad
