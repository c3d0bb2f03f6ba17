"""The simulated device refuses what a GPU refuses; otherwise the tests on it would show nothing."""

import pytest
import torch
from support.sim.devices import DEVICE, NEEDS_DEVICE

pytestmark = [*NEEDS_DEVICE, pytest.mark.skipif(DEVICE not in ("", "sim"), reason="a real device")]


def test_tensors_of_two_devices() -> None:
    there = torch.ones(3, device="sim")
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3, device="sim:1")
    torch.testing.assert_close((there + torch.tensor(1.0)).cpu(), torch.full((3,), 2.0))
    assert there[torch.tensor([0, 2])].shape == (2,)


def test_a_processor_s_memory_and_generator() -> None:
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(3, device="sim").numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randperm(4, device="sim", generator=torch.Generator())
    torch.manual_seed(3)
    first = torch.rand(4, device="sim").cpu()
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4, device="sim").cpu(), first)


def test_fresh_memory_is_not_zero() -> None:
    assert torch.empty(64, device="sim").isnan().all()


def test_a_copy_that_was_not_waited_for() -> None:
    there = torch.ones(3, device="sim")
    here = there.to("cpu", non_blocking=True)
    assert here.isnan().all()
    torch.accelerator.synchronize()
    assert torch.equal(here, torch.ones(3))


def test_pinned_memory_that_is_written_too_early() -> None:
    here = torch.ones(3).pin_memory()
    there = here.to("sim", non_blocking=True)
    here[0] = 2
    with pytest.raises(RuntimeError, match="under way"):
        there.cpu()


def test_copies_of_one_stream_are_done_in_order() -> None:
    """Down into pinned memory, up from it and down again, without waiting between them."""
    here = torch.zeros(3).pin_memory()
    there = torch.ones(3, device="sim")
    here.copy_(there, non_blocking=True)
    up = here.to("sim", non_blocking=True)
    assert here.isnan().all()
    here.copy_(up + 1, non_blocking=True)
    torch.accelerator.synchronize()
    assert torch.equal(up.cpu(), torch.ones(3)) and torch.equal(here, torch.full((3,), 2.0))


def test_a_fused_optimizer_s_count_of_steps_on_the_processor() -> None:
    weight = torch.nn.Parameter(torch.ones(3, device="sim"))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    optimizer.state[weight]["step"] = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="same device"):
        optimizer.step()


def test_a_module_that_is_moved_keeps_its_parameters() -> None:
    layer = torch.nn.Linear(3, 3)
    weight = layer.weight
    layer.to("sim")
    assert layer.weight is weight and weight.device.type == "sim"
    layer(torch.ones(1, 3, device="sim")).sum().backward()
    assert weight.grad is not None and weight.grad.device.type == "sim"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    x = torch.ones(2, 2, device="sim")
    with torch.autocast("sim", dtype):
        assert (x @ x).dtype == dtype
        assert x.exp().dtype == torch.float32


def test_memory_is_counted() -> None:
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    kept = torch.empty(1000, device="sim")
    assert torch.accelerator.memory_allocated() - before == 4000
    del kept
    assert torch.accelerator.memory_allocated() == before
    assert torch.accelerator.max_memory_allocated() >= before + 4000
