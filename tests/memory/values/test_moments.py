"""Moments in bf16: how they are rounded, what they cost in convergence; files and states are read as either."""

import copy
from pathlib import Path

import pytest
import torch
from support.memory import backward, make, make_table, reads
from support.present import present
from torch import Tensor

from distlm.errors import UsageError
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.values import kernels
from distlm.memory.values.files import load_table, save_table
from distlm.memory.values.optimizer import SparseValueOptimizer
from distlm.memory.values.random import rounding_keys, to_bf16
from distlm.memory.values.table import ValueTable

BITS = 2.0**-7
"""Between a number of bf16 and the next, at most, of the number."""


def trained(updates: int, moments: str, table: ValueTable | None = None, first: int = 0) -> ValueTable:
    if table is None:
        table = make_table(moments=moments)
    optimizer = SparseValueOptimizer.of(table.config, [table])
    for update in range(first, first + updates):
        backward(table, reads(update))
        optimizer.update()
    return table


def tensors(table: ValueTable) -> list[Tensor]:
    return [*table.planes(), table.last_step]


def test_roundings_are_right_in_the_mean() -> None:
    x = torch.tensor([[1.0, -1.5, 1 + 2.0**-8, 3e-12, -(1 + 2.0**-8 + 2.0**-10), 0.0]])
    many = torch.arange(20000)
    up, down = to_bf16(x.expand(len(many), -1), -x.expand(len(many), -1), rounding_keys(many, 4, 7), 5)
    for found, wanted in ((up, x[0]), (down, -x[0])):
        assert found.dtype == torch.bfloat16
        assert ((found.float() - wanted).abs() <= BITS * wanted.abs()).all()
        torch.testing.assert_close(found.float().mean(0), wanted, rtol=1e-4, atol=0)
        # What bf16 holds stays.
        assert (found[:, [0, 1, 5]].float() == wanted[[0, 1, 5]]).all()
    # Each moment has noise of its own, and so has each column.
    third = (up[:, 2] > 1), (down[:, 2] < -1)
    assert 0.2 < (third[0] & third[1]).float().mean() < 0.3


@pytest.mark.parametrize("row_steps", [False, True])
def test_compiled_loops_round_as_torch(row_steps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But where fp32 differs in its last bit, one step of bf16."""
    found = []
    for available in (True, False):
        monkeypatch.setattr(kernels, "AVAILABLE", available)
        table, optimizer = make(sub_keys=20, moments="bf16", row_steps=row_steps)
        for update in range(5):
            backward(table, reads(update, slots=400, tokens=60))
            optimizer.update()
        found.append(table)
    compiled, plain = found
    torch.testing.assert_close(compiled.values, plain.values, rtol=1e-4, atol=1e-5)
    for name in ("exp_avg", "exp_avg_sq"):
        mine, theirs = present(getattr(compiled, name)), present(getattr(plain, name))
        assert mine.dtype == theirs.dtype == torch.bfloat16
        assert (mine != theirs).float().mean() < 0.001
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=2 * BITS, atol=1e-12)


def test_small_changes_add_up() -> None:
    """v moves by a thousandth of itself an update, which the nearest number of bf16 would lose each time."""
    table, optimizer = make(moments="bf16", sub_keys=1, k=1)
    table.gradient.limit = 1 << 40
    for _ in range(2000):
        table.gradient.add(torch.zeros(1, 1).int(), torch.ones(1, 1), torch.ones(1, table.width))
        optimizer.update()
    wanted = 1 - 0.999**2000
    assert present(table.exp_avg_sq).float().mean().item() == pytest.approx(wanted, rel=0.02)
    nearest = torch.zeros(()).bfloat16()
    for _ in range(2000):
        nearest = (nearest.float() * 0.999 + 0.001).bfloat16()
    assert nearest.item() < 0.6 * wanted


def test_trains_as_with_fp32() -> None:
    """A memory alone learns a random map: its loss falls below a fifth, by moments of either kind."""
    losses = {}
    for moments in ("fp32", "bf16"):
        torch.manual_seed(5)
        memory = ProductKeyMemory(16, sub_keys=16, heads=2, k=4, key_width=16, seed=1, layer=1)
        target = torch.randn(256, 16)
        x = torch.randn(256, 16)
        rest = torch.optim.Adam(memory.parameters(), lr=1e-3)
        values = SparseValueOptimizer(memory, lr=0.05, moments=moments)
        found = []
        for _ in range(300):
            loss = (memory(x) - target).square().mean()
            loss.backward()
            found.append(loss.item())
            for optimizer in (rest, values):
                optimizer.step()
                optimizer.zero_grad()
        assert present(memory.table.exp_avg).dtype == (torch.bfloat16 if moments == "bf16" else torch.float32)
        losses[moments] = sum(found[-30:]) / 30
        assert losses[moments] < 0.2 * found[0]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)


def test_resumed_bits(tmp_path: Path) -> None:
    """From a checkpoint and from a state dict: as without a stop."""
    whole = trained(8, "bf16")
    half = trained(5, "bf16")
    save_table(half, tmp_path, 4)
    again = make_table(moments="bf16", seed=9)
    load_table(again, tmp_path, 4)
    given = copy.deepcopy(SparseValueOptimizer(half, lr=half.config.lr, moments="bf16").state_dict())
    other = make_table(moments="bf16", seed=9)
    other.values.copy_(half.values)
    SparseValueOptimizer(other, moments="bf16").load_state_dict(given)
    for table in (again, other):
        trained(3, "bf16", table, first=5)
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(tensors(table), tensors(whole), strict=True))


@pytest.mark.parametrize(("written", "read"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_checkpoint_is_read_as_either(written: str, read: str, tmp_path: Path) -> None:
    table = trained(3, written)
    save_table(table, tmp_path, 4)
    other = make_table(moments=read)
    load_table(other, tmp_path, 4)
    assert torch.equal(other.values, table.values)
    assert torch.equal(present(other.exp_avg).bfloat16(), present(table.exp_avg).bfloat16())
    assert present(other.exp_avg_sq).dtype == (torch.float32 if read == "fp32" else torch.bfloat16)
    # And so does a table that is told to, on its way.
    table.configure(other.config)
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(tensors(table), tensors(other), strict=True))


def test_a_state_dict_from_before_there_was_a_choice() -> None:
    table = trained(3, "fp32")
    given = copy.deepcopy(SparseValueOptimizer(table).state_dict())
    for group in given["param_groups"]:
        del group["moments"]
    other = make_table()
    other.values.copy_(table.values)
    SparseValueOptimizer(other).load_state_dict(given)
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(tensors(other), tensors(table), strict=True))


def test_catching_up_wants_fp32() -> None:
    with pytest.raises(UsageError, match=r"memory\.moments=bf16: contradicts memory\.stale=catch_up"):
        make_table(moments="bf16", stale="catch_up")
