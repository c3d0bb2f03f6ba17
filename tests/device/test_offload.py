"""What ZeRO with offload keeps on the device and in the host's memory, and how much of each the plan counts."""

import gc

import pytest
import torch
from support.sim.devices import DEVICE, NEEDS_DEVICE

from distlm.config.training import UpdatesConfig
from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import TransformerLM
from distlm.optim.make import make_optimizer
from distlm.runtime.ranks.rendezvous import join_group
from distlm.runtime.ranks.world import World
from distlm.training.dsconfig import merge_ds_config, offloaded
from distlm.training.engine import Engine
from distlm.training.memory_need import states_memory
from distlm.training.objective import TrainModule

# A real device's allocator and its libraries keep more than such a small model.
pytestmark = [*NEEDS_DEVICE, pytest.mark.skipif(DEVICE not in ("", "sim"), reason="a real device")]

WORLD = World(0, 1, 0, 1, "here", "single")
MODEL = TransformerConfig(layers=6, width=128, heads=2, ffn_width=512, cutoffs=[1000], max_positions=16)
# In proportion to the model.
SMALL = {"reduce_bucket_size": 200_000, "stage3_prefetch_bucket_size": 200_000}
SMALL |= {
    "stage3_param_persistence_threshold": 2000,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 200_000,
}
NAMES = ["zero1", "zero1-offload", "zero2", "zero2-offload", "zero3", "zero3-offload"]


def _update(engine: Engine, device: torch.device) -> None:
    """Of two micro-batches of few tokens: next to no activations."""
    for number in range(2):
        words = torch.arange(18, device=device).reshape(2, 9)
        sums = engine.forward(words[:, :-1], words[:, 1:], None)
        assert isinstance(engine.module, TrainModule)
        engine.backward(engine.module.loss(sums, 0.05), last=number == 1)
    engine.update(0.01)


def _host_bytes() -> dict[int, int]:
    """Address → bytes of every storage of a tensor in the host's memory."""
    # By their type: some objects of torch warn when they are asked what they are.
    found = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    found += [value.grad for value in found if value.is_leaf and value.grad is not None]
    storages = [value.untyped_storage() for value in found if value.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_where_things_are_and_what_they_take(name: str, precision: str) -> None:
    device = torch.device(DEVICE, 0)
    train = UpdatesConfig(precision=precision, optimizer="adam", deepspeed=name)  # type: ignore[arg-type]
    join_group(WORLD)
    gc.collect()
    before, others = torch.accelerator.memory_allocated(), _host_bytes()
    module = TrainModule(TransformerLM(MODEL, 4000), "last_ffn_input", 0.0, "mean")
    sizes = [parameter.numel() for parameter in module.model.parameters()]
    config = merge_ds_config(train, 1, 2)
    config["zero_optimization"] |= {key: value for key, value in SMALL.items() if key in config["zero_optimization"]}
    engine = Engine(module, make_optimizer(train, module), config, WORLD, device)
    if precision == "fp16":
        engine._scaler().cur_scale = 256.0
    _update(engine, device)
    torch.accelerator.reset_peak_memory_stats()
    _update(engine, device)
    peak = torch.accelerator.max_memory_allocated() - before

    away = offloaded(config)
    place = "cpu" if away.optimizer else DEVICE
    for holder in engine._holders():
        states = engine._base.state[holder]
        assert {holder.device.type, *(value.device.type for value in states.values())} == {place}
    assert all(parameter.device.type == DEVICE for parameter in module.model.parameters())

    need = states_memory(sum(sizes), max(sizes), 2, precision, config, 1)
    assert need.device / 1.5 < peak < need.device * 1.5
    if away.optimizer:
        here = sum(size for place, size in _host_bytes().items() if place not in others)
        assert need.host / 1.5 < here < need.host * 1.5
    else:
        assert need.host == 0
    # The next engine's memory is counted from nothing.
    engine._engine.destroy()
