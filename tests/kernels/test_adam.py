"""Updates of a table by the kernel, against torch: every form of the optimizer, and what must not change."""

from typing import Any

import pytest
import torch
from support.kernels import DEVICE, taking
from support.memory import Reads, backward, make, reads
from support.present import present
from torch import Tensor

from distlm.kernels import adam
from distlm.memory.values import kernels
from distlm.memory.values.optimizer import SparseValueOptimizer
from distlm.memory.values.table import ValueTable

BITS = 2.0**-7
"""Between a number of bf16 and the next, at most, of the number."""
FORMS: list[dict[str, Any]] = [
    {}, {"optimizer": "adam", "width": 7}, {"row_steps": True}, {"clip_norm": 0.05, "width": 1},
    {"stale": "catch_up"}, {"moments": "bf16"}, {"moments": "bf16", "row_steps": True, "optimizer": "adam"},
]  # fmt: skip


def trained(updates: int = 3, sweep: float = 2.0, limit: int = 0, **changes: Any) -> tuple[ValueTable, list[float]]:
    """A table after updates that read other slots each, and the norms of their gradients."""
    table, optimizer = make(**{"sub_keys": 4, "width": 20, **changes})
    optimizer.sweep = sweep
    table.to(DEVICE)
    table.gradient.limit = limit or table.gradient.limit
    norms = []
    for update in range(updates):
        for part in range(2):
            given = reads(10 * update + part, slots=16, tokens=2, count=3, width=table.width)
            backward(table, Reads(*(x.to(DEVICE) for x in (given.slots, given.weights, given.upstream))))
        norms += optimizer.update().norms
    return table, norms


def state(table: ValueTable) -> list[Tensor]:
    counters = [table.last_step, table.row_steps]
    return [*table.planes(), *(x for x in counters if x is not None)]


@pytest.mark.parametrize("changes", FORMS, ids=str)
def test_every_form(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    wanted, norms = trained(**changes)
    taking(monkeypatch, "update")
    found, mine = trained(**changes)
    assert mine == pytest.approx(norms, rel=1e-5)
    for x, y in zip(state(found), state(wanted), strict=True):
        assert x.dtype == y.dtype
        if x.dtype == torch.bfloat16:
            torch.testing.assert_close(x.float(), y.float(), rtol=2 * BITS, atol=1e-12)
            assert (x != y).float().mean() < 0.02
        else:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_sweep_through_all_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """catch_up: slots that nobody read have an empty gradient and move all the same, once they have moments."""
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    wanted, _ = trained(2, 0.0, stale="catch_up")
    taking(monkeypatch, "update")
    found, _ = trained(2, 0.0, stale="catch_up")
    for x, y in zip(state(found), state(wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_slots_that_nobody_reads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    taking(monkeypatch, "update")
    fresh = make(sub_keys=4)[0].values.to(DEVICE)
    table, _ = trained(1)
    still = table.last_step == 0
    assert 0 < still.sum() < table.slots
    assert torch.equal(table.values[still], fresh[still]) and not torch.equal(table.values, fresh)
    assert present(table.exp_avg)[still].eq(0).all()


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_bits_are_those_of_any_cut_of_the_columns(moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 2 has the second half of the columns, and the noise that goes with it."""
    taking(monkeypatch, "update")
    generator = torch.Generator().manual_seed(0)
    width, half, read = 24, 12, 3
    rows, offsets = torch.tensor([1, 4, 6]), torch.tensor([0, 4, 4, 13]).int()
    p, m, v, source = (torch.randn(8, width, generator=generator) for _ in range(4))
    planes = [p, *(x.abs().to(torch.bfloat16 if moments == "bf16" else torch.float32) for x in (m, v))]
    index, weights = torch.randint(8, (13,), generator=generator).int(), torch.rand(13, generator=generator)
    keys = torch.randint(1 << 32, (read,), generator=generator)

    def update(first: int, last: int) -> list[Tensor]:
        own = [x[:, first:last].clone(memory_format=torch.contiguous_format).to(DEVICE) for x in planes]
        bags = [x.to(DEVICE) for x in (source[:, first:last].contiguous(), index, weights, offsets)]
        steps = (torch.full((read,), 0.01).to(DEVICE), torch.full((read,), 1e-8).to(DEVICE))
        squares = adam.adam_rows(
            (own[0], own[1], own[2]), rows.to(DEVICE), (bags[0], bags[1], bags[2], bags[3]), 0.5, (0.9, 0.999), steps,
            (keys.to(DEVICE), first),
        )  # fmt: skip
        assert squares.dtype == torch.float64 and squares.shape == (1,) and squares > 0
        return own

    for x, y in zip(update(0, width), update(half, width), strict=True):
        assert torch.equal(x[:, half:], y)
    again = update(0, width)
    assert all(torch.equal(x, y) for x, y in zip(update(0, width), again, strict=True))
    # The row of an empty bag has no gradient: its moments shrink.
    assert (again[2][4].float() <= planes[2][4].float().to(DEVICE) * (1 + BITS)).all()


def test_sums_that_are_taken_early_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    taking(monkeypatch, "update")
    early, late = trained(2, limit=1)[0], trained(2, limit=1 << 40)[0]
    assert all(torch.equal(x, y) for x, y in zip(state(early), state(late), strict=True))


def test_an_update_without_reads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    taking(monkeypatch, "update")
    table, optimizer = make(sub_keys=4)
    table.to(DEVICE)
    before = table.values.clone()
    assert optimizer.update().rows == [0]
    table.gradient.add(*(x.to(DEVICE) for x in (torch.zeros(0, 3).int(), torch.zeros(0, 3), torch.zeros(0, 20))))
    assert SparseValueOptimizer.update(optimizer).rows == [0]
    assert torch.equal(table.values, before)
