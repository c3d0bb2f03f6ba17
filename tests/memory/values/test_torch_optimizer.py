"""The optimizer of the values as one of torch: groups, schedulers, GradScaler, accumulation, state dicts. Against
nn.EmbeddingBag(sparse=True) and torch.optim.SparseAdam."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.memory import Reads, backward, make_table, reads
from support.present import present
from torch import Tensor, nn

from distlm.errors import DistlmError, UsageError
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.values.optimizer import SparseValueOptimizer
from distlm.memory.values.table import ValueTable

LR = 0.01


class Pair:
    """A table with its optimizer, and torch's parts beside it, given the same reads."""

    def __init__(self, **options: Any) -> None:
        self.table = make_table()
        self.bag = nn.EmbeddingBag.from_pretrained(self.table.values.clone(), freeze=False, mode="sum", sparse=True)
        self.mine = SparseValueOptimizer(self.table, lr=LR, **options)
        self.theirs = torch.optim.SparseAdam(self.bag.parameters(), lr=LR)

    @property
    def both(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return self.mine, self.theirs

    def backward(self, given: Reads, factor: float = 1.0) -> None:
        given = Reads(given.slots, given.weights, given.upstream * factor)
        backward(self.table, given)
        self.bag(given.slots.long(), per_sample_weights=given.weights).backward(given.upstream)

    def step(self) -> None:
        for optimizer in self.both:
            optimizer.step()
            optimizer.zero_grad()

    def check(self) -> None:
        assert (self.table.values - self.bag.weight).abs().max() <= 1e-6


def planes(table: ValueTable) -> list[Tensor]:
    return [table.values.clone(), present(table.exp_avg).clone(), present(table.exp_avg_sq).clone()]


def test_thirty_steps() -> None:
    pair = Pair()
    before = pair.table.values.clone()
    for step in range(30):
        pair.backward(reads(step, share=0.3))
        pair.step()
        pair.check()
    assert (pair.table.values - before).abs().max() > 5 * LR


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=12),
    ],
    ids=["lambda", "cosine", "one cycle"],
)
def test_schedulers(make: Callable[[Any], Any]) -> None:
    """OneCycleLR cycles β₁, too."""
    pair = Pair()
    schedulers = [make(optimizer) for optimizer in pair.both]
    for step in range(10):
        pair.backward(reads(step, share=0.3))
        pair.step()
        for scheduler in schedulers:
            scheduler.step()
        assert pair.mine.param_groups[0]["lr"] == pair.theirs.param_groups[0]["lr"]
        pair.check()
    assert pair.mine.param_groups[0]["lr"] != LR


def test_a_scheduler_and_catching_up_are_dense_adam_with_it() -> None:
    """What a slot missed is made up for at the rate of the time."""
    table = make_table()
    dense = nn.Parameter(table.values.clone())
    mine, theirs = SparseValueOptimizer(table, lr=LR, form="adam", stale="catch_up"), torch.optim.Adam([dense], lr=LR)
    mine.sweep = 2.0
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5) for optimizer in (mine, theirs)]
    for step in range(10):
        given = reads(step, tokens=4, share=0.2)
        backward(table, given)
        (given.weights[..., None] * dense[given.slots.long()]).sum(1).backward(given.upstream)
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        asked = reads(100 + step)
        with torch.no_grad():
            found = table.eval()(asked.slots, asked.weights, torch.float32)
            torch.testing.assert_close(
                found, (asked.weights[..., None] * dense[asked.slots.long()]).sum(1), rtol=2e-5, atol=2e-5
            )
        table.train()


def test_three_micro_batches_and_zero_grad() -> None:
    pair = Pair()
    for step in range(4):
        pair.backward(reads(100 + step))
        for optimizer in pair.both:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        for micro in range(3):
            pair.backward(reads(3 * step + micro, share=0.3), 1 / 3)
        pair.step()
        pair.check()
    # Nothing was read: no update, as of a parameter without gradient.
    pair.mine.step()
    assert pair.table.updates == 4 and present(pair.mine.outcome).rows == [0]


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool) -> None:
    """With an Adam beside it, and an overflow of the values' gradient, then of the other's."""
    pair, plain = Pair(), Pair()
    other = nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([other], lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
    for step in range(8):
        given = reads(step, share=0.3)
        scale = float(scaler.scale(torch.ones(1)))
        wrong = step in (2, 5)
        backward(pair.table, Reads(given.slots, given.weights, given.upstream * scale))
        other.grad = torch.ones(3) * scale
        if step == 2:
            backward(pair.table, Reads(given.slots, given.weights, given.upstream * torch.inf))
        if step == 5:
            other.grad[1] = torch.nan
        values, others = pair.table.values.clone(), other.detach().clone()
        for optimizer in (adam, pair.mine):
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if wrong else scale)
        assert torch.equal(pair.table.values, values) == (step == 2)
        assert torch.equal(other, others) == (step == 5)
        assert pair.table.gradient.empty and pair.table.gradient.factor.grad is None
        if step != 2:
            plain.backward(given)
            plain.step()
        assert torch.equal(pair.table.values, plain.table.values)
    assert not hasattr(pair.mine, "found_inf")


def test_a_gradient_that_is_not_finite_without_a_scaler() -> None:
    pair = Pair()
    wrong = reads(1)
    wrong.upstream[3, 4] = torch.inf
    backward(pair.table, wrong)
    with pytest.raises(DistlmError, match="layer 4 is infinite or NaN at its update 1"):
        pair.mine.step()


def test_closure() -> None:
    pair = Pair()

    def closure() -> float:
        assert torch.is_grad_enabled()
        pair.backward(reads(1))
        return 3.5

    assert pair.mine.step(closure) == 3.5
    pair.theirs.step()
    pair.check()


OPTIONS: list[dict[str, Any]] = [
    {}, {"row_steps": True}, {"stale": "catch_up", "form": "adam"}, {"clip_norm": 0.5, "betas": (0.5, 0.9)},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_resumed_training_has_the_same_bits(options: dict[str, Any], order: str) -> None:
    """In mid-training, with a scheduler."""

    def fresh(seed: int) -> tuple[ValueTable, SparseValueOptimizer, Any]:
        table = make_table(seed=seed)
        optimizer = SparseValueOptimizer(table, lr=LR, **options)
        optimizer.sweep = 2.0
        return table, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)

    def train(steps: range, table: ValueTable, optimizer: SparseValueOptimizer, scheduler: Any) -> None:
        for step in steps:
            backward(table, reads(step, share=0.3))
            optimizer.step()
            scheduler.step()

    table, *one = fresh(3)
    train(range(6), table, *one)
    other, *two = fresh(8)
    # What is under way there is put aside.
    backward(other, reads(50))
    saved = copy.deepcopy([table.state_dict(), *(part.state_dict() for part in one)])
    targets = [other, *two]
    for place in (0, 1, 2) if order == "model first" else (1, 0, 2):
        targets[place].load_state_dict(saved[place])
    asked = reads(70)
    with torch.no_grad():
        outputs = [t.eval()(asked.slots, asked.weights, torch.float32) for t in (table, other)]
    assert torch.equal(*outputs)
    for part in (table, other):
        part.train()
    train(range(6, 12), table, *one)
    train(range(6, 12), other, *two)
    for mine, theirs in zip(planes(other), planes(table), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(other.last_step, table.last_step) and other.updates == table.updates == 12
    assert two[0].param_groups[0]["lr"] == one[0].param_groups[0]["lr"] == LR / 8
    assert not one[0].state, "the moments are the table's"


def test_state_dicts_are_those_of_torch_and_hold_no_copies() -> None:
    pair = Pair()
    assert pair.mine.state_dict()["state"] == {}
    pair.backward(reads(1))
    pair.step()
    mine, theirs = (optimizer.state_dict() for optimizer in pair.both)
    assert mine.keys() == theirs.keys()
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(mine["state"][0][name], theirs["state"][0][name], rtol=1e-5, atol=1e-7)
    assert mine["state"][0]["exp_avg"].data_ptr() == present(pair.table.exp_avg).data_ptr()
    assert mine["param_groups"][0]["params"] == [0]
    for changed, message in [
        ({"exp_avg": torch.zeros(49, 3)}, r"exp_avg is \[49, 3\], columns 0 to 20 of 20"),
        ({"last_step": torch.zeros(4)}, r"last_step is \[4\], this memory's \[49\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            Pair().mine.load_state_dict({**mine, "state": {0: mine["state"][0] | changed}})
    with pytest.raises(ValueError, match="row_steps"):
        Pair(row_steps=True).mine.load_state_dict(
            {**mine, "param_groups": Pair(row_steps=True).mine.state_dict()["param_groups"]}
        )
    # Of a training that had not begun: neither has this one any more.
    pair.mine.load_state_dict(Pair().mine.state_dict())
    assert pair.table.updates == 0 and pair.table.exp_avg is None


def test_moments_of_a_whole_table_serve_any_cut() -> None:
    whole, optimizer = make_table(), None
    optimizer = SparseValueOptimizer(whole, lr=LR)
    backward(whole, reads(1))
    optimizer.step()
    for column in range(4):
        part = make_table(columns=4, column=column, seed=9)
        own = SparseValueOptimizer(part, lr=LR)
        part.load_state_dict(whole.state_dict())
        own.load_state_dict(optimizer.state_dict())
        columns = slice(5 * column, 5 * column + 5)
        for mine, theirs in zip(planes(part), planes(whole), strict=True):
            assert torch.equal(mine, theirs[:, columns])
        with pytest.raises(
            ValueError, match=rf"exp_avg is \[49, 5\], columns {5 * column} to .*this rank has columns 0"
        ):
            Pair().mine.load_state_dict(own.state_dict())


def test_groups() -> None:
    """Options of each group; memories are found in whatever modules are given, a shared one once."""
    memories = [ProductKeyMemory(8, sub_keys=4, k=2, key_width=4, seed=seed) for seed in range(3)]
    shared = nn.ModuleList([memories[0], nn.Sequential(memories[0])])
    groups: list[dict[str, Any]] = [
        {"params": shared},
        {"params": [memories[1]], "lr": 0.5, "form": "adam", "clip_norm": 1.0},
    ]
    optimizer = SparseValueOptimizer(groups, lr=LR)
    optimizer.add_param_group({"params": memories[2], "lr": 0.0})
    assert optimizer.tables == [memory.table for memory in memories]
    before = [memory.table.values.clone() for memory in memories]
    for memory in memories:
        memory(torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
    optimizer.step()
    moved = [(m.table.values - old).abs().max().item() for m, old in zip(memories, before, strict=True)]
    assert moved == pytest.approx([LR, 0.5, 0.0], rel=1e-2)
    assert memories[1].table.rule.corrected_eps and not memories[0].table.rule.corrected_eps
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": memories[0]})


def test_a_frozen_memory_and_one_that_nobody_read_stay() -> None:
    frozen, idle, read = (
        ProductKeyMemory(8, sub_keys=4, k=2, key_width=4, frozen=place == 0, seed=place) for place in range(3)
    )
    optimizer = SparseValueOptimizer([frozen, idle, read], lr=LR)
    (frozen(torch.randn(1, 5, 8)) + read(torch.randn(1, 5, 8))).sum().backward()
    optimizer.step()
    assert [memory.table.updates for memory in (frozen, idle, read)] == [0, 0, 1]


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no ProductKeyMemory"):
        SparseValueOptimizer(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="give modules that hold memories, not tensors"):
        SparseValueOptimizer(nn.Linear(2, 2).parameters())  # type: ignore[arg-type]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lr": -1.0}, r"memory\.lr=-1\.0"), ({"betas": (0.9, 1.0)}, r"memory\.betas"), ({"eps": 0.0}, r"memory\.eps"),
        ({"stale": "catch_up", "row_steps": True}, r"memory\.row_steps"),
    ]  # fmt: skip
    for options, message in cases:
        with pytest.raises(UsageError, match=message):
            SparseValueOptimizer(make_table(), **options)
    pair = Pair()
    pair.backward(reads(1))
    pair.step()
    with pytest.raises(UsageError, match="has been trained for 1 updates without counts"):
        SparseValueOptimizer(pair.table, row_steps=True)
