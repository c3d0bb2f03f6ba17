"""The DeepSpeed adapter on one rank: what DeepSpeed does behind our back is undone, and full state reads and writes."""

import math
from typing import Any

import pytest
import torch
from support.present import present

from distlm.config.training import UpdatesConfig
from distlm.errors import DistlmError
from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import TransformerLM
from distlm.optim.make import make_optimizer
from distlm.runtime.ranks.rendezvous import join_group
from distlm.runtime.ranks.world import World
from distlm.training.dsconfig import merge_ds_config
from distlm.training.engine import Engine, Step, share
from distlm.training.objective import TrainModule

WORLD = World(0, 1, 0, 1, "here", "single")
CPU = torch.device("cpu")
MODEL = TransformerConfig(layers=1, width=16, heads=2, ffn_width=32, cutoffs=[10], max_positions=16)


def engine_of(config: dict[str, Any] | None = None, **settings: Any) -> Engine:
    train = UpdatesConfig(**{"precision": "fp32", "warmup_updates": 0, "lr": 0.1, "clip_norm": 1.0, **settings})
    torch.manual_seed(3)
    module = TrainModule(TransformerLM(MODEL, 40), "last_ffn_input", 0.0, "mean")
    join_group(WORLD)
    merged = merge_ds_config(train, train.micro_blocks, 1) | (config or {})
    return Engine(module, make_optimizer(train, module), merged, WORLD, CPU)


def step(engine: Engine, scale: float = 0.05, lr: float = 0.1) -> Any:
    torch.manual_seed(5)  # the same dropout in every step of every engine
    words = torch.arange(18).reshape(2, 9)
    sums = engine.forward(words[:, :-1], words[:, 1:], None)
    assert isinstance(engine.module, TrainModule)
    engine.backward(engine.module.loss(sums, scale), last=True)
    return engine.update(lr)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: engine.read(name).clone() for name in engine.names}


def test_warm_up_step_of_zero_0_is_taken_back() -> None:
    engine = engine_of(deepspeed="zero0", precision="bf16", optimizer="adam", weight_decay=0.5)
    assert engine.state_keys() == []
    torch.manual_seed(3)
    for name, value in TransformerLM(MODEL, 40).named_parameters():
        assert torch.equal(engine.read(name), value.bfloat16().float()), name
    step(engine)
    assert engine.scalars().state == {"step": 1.0}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overflow_leaves_weights_and_optimizer_alone(stage: int) -> None:
    engine = engine_of(deepspeed=f"zero{stage}", precision="fp16", optimizer="nag")
    scaler = engine._scaler()
    scaler.cur_scale = 256.0
    step(engine)
    before, scalars = weights(engine), engine.scalars()
    assert engine.state_keys() == ["momentum_buffer"]
    scaler.cur_scale = 2.0**40
    outcome = step(engine, lr=0.07)
    assert outcome.skipped
    assert outcome.gradient_norm == float("inf")
    assert outcome.loss_scale == 2.0**39
    assert all(torch.equal(before[name], value) for name, value in weights(engine).items())
    assert engine.scalars().group == scalars.group == {"lr_old": 0.1}
    scaler.cur_scale = 1.0
    assert not step(engine).skipped
    assert not all(torch.equal(before[name], value) for name, value in weights(engine).items())


def test_loss_scale_at_its_floor_is_a_clear_error() -> None:
    engine = engine_of(deepspeed="zero1", precision="fp16")
    engine._scaler().cur_scale = 1.0
    with pytest.raises(DistlmError, match="overflow fp16 even at the smallest loss scale"):
        step(engine, scale=float("inf"))


# ZeRO 3 comes last: DeepSpeed then puts its own linear layer in the place of torch's for the rest of a process.
AWAY = [f"zero{stage}-offload" for stage in (1, 2, 3)]
LOST = [
    ("fp32", "zero0", math.nan), ("fp32", "zero0", math.inf), ("fp32", "zero1", math.nan), ("fp32", "zero3", math.nan),
    ("bf16", "zero0", math.nan), ("bf16", "zero2", math.inf), ("fp16", "zero1", math.inf), ("fp16", "zero3", math.nan),
]  # fmt: skip
NAMES = ["zero0", "zero1", "zero2", *AWAY[:2], "zero3", AWAY[2]]


@pytest.mark.parametrize(("precision", "name", "bad"), LOST)
def test_a_gradient_that_is_not_finite_changes_nothing(precision: str, name: str, bad: float) -> None:
    """In every stage and precision alike, and the updates after it are those that would have been without it."""
    moved = []
    for scales in ([0.05, bad, 0.05], [0.05, 0.05]):
        engine = engine_of({"gradient_accumulation_steps": 2}, deepspeed=name, precision=precision)
        for scale in scales:
            if precision == "fp16":
                engine._scaler().cur_scale = 256.0
            before, scalars = weights(engine), engine.scalars()
            outcome, lost = _update_of_two(engine, scale), scale != 0.05
            assert (outcome.skipped, outcome.gradient_norm == math.inf) == (lost, lost)
            if lost:
                assert all(torch.equal(before[key], value) for key, value in weights(engine).items())
                assert engine.scalars().state == scalars.state
        moved.append(weights(engine))
    assert all(torch.equal(moved[0][key], value) for key, value in moved[1].items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optimizer", ["adam", "nag"])
def test_state_moves_between_stages_unchanged(name: str, optimizer: str) -> None:
    source = engine_of(deepspeed="zero2", optimizer=optimizer)
    step(source)
    keys, scalars = source.state_keys(), source.scalars()
    states = {(name, key): source.read(name, key).clone() for name in source.names for key in keys}
    target = engine_of(deepspeed=name, optimizer=optimizer)
    target.restore_scalars(scalars)
    for name, value in weights(source).items():
        target.write(name, value)
    for (name, key), value in states.items():
        target.write(name, value, key)
    assert target.state_keys() == keys
    assert target.scalars().state == scalars.state
    assert all(torch.equal(target.read(name), value) for name, value in weights(source).items())
    assert all(torch.equal(target.read(name, key), value) for (name, key), value in states.items())


@pytest.mark.parametrize("name", AWAY)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-3), ("bf16", 1e-2)])
def test_offloaded_optimizer_trains_like_the_plain_one(name: str, precision: str, tolerance: float) -> None:
    """Norms and weights of two updates of two micro-batches each."""
    settings: dict[str, Any] = {"precision": precision, "optimizer": "nag"}
    more = {"gradient_accumulation_steps": 2}
    norms, found = [], []
    for each in (name, name.removesuffix("-offload")):
        engine = engine_of(more, deepspeed=each, **settings)
        if precision == "fp16":
            engine._scaler().cur_scale = 256.0
        norms.append([_update_of_two(engine).gradient_norm for _ in range(2)])
        found.append(weights(engine))
        assert engine.state_keys() == ["momentum_buffer"]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for key, value in found[1].items():
        torch.testing.assert_close(found[0][key], value, rtol=tolerance, atol=tolerance * float(value.abs().max()))


def _update_of_two(engine: Engine, scale: float = 0.05) -> Step:
    """An update of two micro-batches."""
    for number in range(2):
        torch.manual_seed(5 + number)
        words = torch.randint(0, 40, (2, 9))
        sums = engine.forward(words[:, :-1], words[:, 1:], None)
        assert isinstance(engine.module, TrainModule)
        engine.backward(engine.module.loss(sums, scale), last=number == 1)
    return engine.update(0.1)


COMBINATIONS = [(p, z) for p in ("fp32", "fp16", "bf16") for z in range(4) if (p, z) != ("fp16", 0)]


@pytest.mark.parametrize(("precision", "stage"), COMBINATIONS)
def test_every_precision_and_stage_takes_the_step_of_plain_torch(precision: str, stage: int) -> None:
    """One clipped NAG step: p −= (1 + m)·lr·g with v = 0 before, g clipped to norm 1."""
    torch.manual_seed(3)
    module = TrainModule(TransformerLM(MODEL, 40), "last_ffn_input", 0.0, "mean")
    words = torch.arange(18).reshape(2, 9)
    start = {name: value.detach().clone() for name, value in module.model.named_parameters()}
    torch.manual_seed(5)
    module.loss(module(words[:, :-1], words[:, 1:]), 0.05).backward()
    gradients = {name: present(value.grad) for name, value in module.model.named_parameters()}
    norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
    assert norm > 1

    engine = engine_of(deepspeed=f"zero{stage}", precision=precision, optimizer="nag")
    if precision == "fp16":
        engine._scaler().cur_scale = 256.0
    tolerance = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2}[precision]
    assert step(engine).gradient_norm == pytest.approx(norm, rel=tolerance)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    moved = torch.cat([(engine.read(name) - before.to(dtype).float()).flatten() for name, before in start.items()])
    expected = -1.99 * 0.1 / norm * torch.cat([gradients[name].flatten() for name in start])
    assert float((moved - expected).norm()) <= tolerance * float(expected.norm())


def test_what_deepspeed_refuses_is_our_error() -> None:
    with pytest.raises(DistlmError, match=r"train\.deepspeed: DeepSpeed refuses this configuration"):
        engine_of({"gradient_predivide_factor": 2.0}, deepspeed="zero2")


def test_share_of_one_rank() -> None:
    join_group(WORLD)
    assert share([1.5, 0.1]) == [[1.5, 0.1]]
