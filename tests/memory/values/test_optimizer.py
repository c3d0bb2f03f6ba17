"""Updates of a table's values against torch's SparseAdam and Adam, and against what their definitions say."""

import math
from typing import Any

import pytest
import torch
from support.memory import WIDTH, backward, dense_gradient, dense_sums, make, make_table, reads, settings
from support.present import present
from torch import Tensor, nn

from distlm.errors import DistlmError
from distlm.memory import lookup
from distlm.memory.values import kernels
from distlm.memory.values.adam import Adam
from distlm.memory.values.optimizer import SparseValueOptimizer

SLOTS = 49


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test with the compiled loops of processors, and with torch's operations, which GPUs use."""
    assert kernels.AVAILABLE, "numba is not installed"
    monkeypatch.setattr(kernels, "AVAILABLE", request.param == "compiled")
    return str(request.param)


def close(mine: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(mine.double(), wanted.double(), rtol=tolerance, atol=tolerance * 1e-1)


def torch_bag(values: Tensor) -> nn.EmbeddingBag:
    return nn.EmbeddingBag.from_pretrained(values.clone(), freeze=False, mode="sum", sparse=True)


def state(table: object) -> list[Tensor]:
    names = ("values", "exp_avg", "exp_avg_sq", "last_step", "row_steps")
    return [tensor.clone() for name in names if (tensor := getattr(table, name)) is not None]


def test_sparse_adam_of_two_micro_batches_with_stale_slots_is_that_of_torch() -> None:
    table, optimizer = make()
    bag = torch_bag(table.values)
    theirs = torch.optim.SparseAdam(bag.parameters(), lr=table.config.lr)
    for update in range(12):
        for micro in range(2):
            given = reads(2 * update + micro, share=0.3)
            out, _ = backward(table, given)
            wanted = bag(given.slots.long(), per_sample_weights=given.weights)
            close(out, wanted)
            wanted.backward(given.upstream)
        found = optimizer.update()
        assert found.rows == [present(bag.weight.grad).coalesce().indices().shape[1]]
        assert found.norms[0] == pytest.approx(present(bag.weight.grad).coalesce().values().norm().item(), rel=1e-5)
        theirs.step()
        theirs.zero_grad()
        close(table.values, bag.weight)
    close(present(table.exp_avg), theirs.state[bag.weight]["exp_avg"])
    close(present(table.exp_avg_sq), theirs.state[bag.weight]["exp_avg_sq"])


def test_adam_is_that_of_torch_where_every_slot_is_read() -> None:
    table, optimizer = make(optimizer="adam", sub_keys=3)
    values = nn.Parameter(table.values.clone())
    theirs = torch.optim.Adam([values], lr=table.config.lr)
    for update in range(12):
        given = reads(update, slots=9, tokens=30, share=1.0)
        given.upstream *= 10.0 ** -(update % 9)
        assert len(given.slots.unique()) == 9
        backward(table, given)
        optimizer.update()
        values.grad = dense_gradient(given, 9).float()
        theirs.step()
        close(table.values, values)
    close(present(table.exp_avg), theirs.state[values]["exp_avg"], 1e-5)


def test_where_eps_is_added_matters_for_small_gradients() -> None:
    """The first step is lr·|g| / (|g| + ε) in Adam, and lr·|g| / (|g| + ε / √(1 − β₂)) in SparseAdam."""
    for form, wanted in (("adam", 5.0e-4), ("sparse_adam", 3.07e-5)):
        table, optimizer = make(optimizer=form, lr=1e-3, values="zero")
        table.gradient.add(torch.zeros(1, 1).int(), torch.ones(1, 1), torch.full((1, WIDTH), -1e-8))
        optimizer.update()
        assert table.values[0, 0].item() == pytest.approx(wanted, rel=2e-3)
        assert table.values[1:].abs().sum() == 0


@pytest.mark.parametrize("form", ["adam", "sparse_adam"])
def test_row_steps_count_a_slots_own_updates(form: str) -> None:
    """Every slot is trained like a parameter of its own that is stepped when it is read."""
    table, optimizer = make(optimizer=form, row_steps=True, sub_keys=3)
    rows = [nn.Parameter(row.clone()[None]) for row in table.values]
    theirs = [torch.optim.Adam([row], lr=table.config.lr) for row in rows]
    counts = torch.zeros(9).int()
    for update in range(10):
        given = reads(update, slots=9, share=0.4)
        backward(table, given)
        optimizer.update()
        gradient = dense_gradient(given, 9).float()
        for slot in given.slots.unique().tolist():
            counts[slot] += 1
            if form == "sparse_adam":
                theirs[slot].param_groups[0]["eps"] = 1e-8 / math.sqrt(1 - 0.999 ** int(counts[slot]))
            rows[slot].grad = gradient[slot][None]
            theirs[slot].step()
        close(table.values, torch.cat(list(rows)))
    assert torch.equal(present(table.row_steps), counts)
    assert counts.min() < counts.max()


class DenseAdam:
    """Either form on all slots, those without gradient too: fp64."""

    def __init__(self, values: Tensor, config: object) -> None:
        self.values, self.rule = values.double(), Adam.of(config)  # type: ignore[arg-type]
        self.m, self.v, self.update = torch.zeros_like(self.values), torch.zeros_like(self.values), 0

    def step(self, gradient: Tensor) -> None:
        self.update += 1
        rule = self.rule
        self.m = rule.beta1 * self.m + (1 - rule.beta1) * gradient
        self.v = rule.beta2 * self.v + (1 - rule.beta2) * gradient**2
        root = math.sqrt(1 - rule.beta2**self.update)
        eps = rule.eps * (root if rule.corrected_eps else 1)
        self.values -= rule.lr * root / (1 - rule.beta1**self.update) * self.m / (self.v.sqrt() + eps)


def test_the_dense_reference_is_torchs_adam() -> None:
    values = nn.Parameter(make_table().values.clone())
    mine, theirs = DenseAdam(values.detach(), settings(optimizer="adam")), torch.optim.Adam([values], lr=0.01)
    for update in range(8):
        values.grad = dense_gradient(reads(update)).float()
        mine.step(values.grad.double())
        theirs.step()
    close(values, mine.values)


@pytest.mark.parametrize("sweep", [2.0, 0.15, 0.0])
@pytest.mark.parametrize("form", ["adam", "sparse_adam"])
@pytest.mark.parametrize("betas", [[0.9, 0.999], [0.5, 0.9], [0.0, 0.99]], ids=str)
def test_catch_up_is_dense_adam(form: str, betas: list[float], sweep: float) -> None:
    """Whatever is read, at any time, in training and evaluation, is what dense Adam's table holds; whether updates
    move the slots that they read, or all, or now these and now those."""
    table, optimizer = make(optimizer=form, betas=betas, stale="catch_up", lr=0.003)
    optimizer.sweep = sweep
    dense = DenseAdam(table.values, table.config)
    longest, swept = 0, 0
    for update in range(60):
        # A slot is read by nobody for dozens of updates, and most for some.
        given = reads(update, tokens=4, share=(0.1, 0.2, 0.2)[update % 3] if update % 30 else 1.0)
        given.upstream *= 10.0 ** -(update % 5)
        longest = max(longest, int(table.missed(given.slots.flatten().long()).max()))
        out, of_weights = backward(table, given)
        close(out, dense_sums(dense.values, given), 3e-5)
        chosen = dense.values[given.slots.long()]
        close(of_weights, (chosen * given.upstream.double()[:, None]).sum(2), 3e-5)
        rows = optimizer.update().rows[0]
        assert rows == len(given.slots.unique())
        swept += int((table.last_step == update + 1).sum()) > rows
        dense.step(dense_gradient(given))
        asked = reads(1000 + update)
        with torch.no_grad():
            close(table.eval()(asked.slots, asked.weights, torch.float32), dense_sums(dense.values, asked), 3e-5)
        table.train()
    assert (longest > 20) == (sweep == 2.0)
    assert swept > 50 if sweep == 0 else 20 < swept < 50 if sweep < 1 else swept == 0
    if betas == [0.5, 0.9]:
        assert table.rule.replayed < 40
    lazy = table.values.clone()
    table.settle()
    close(table.values, dense.values, 3e-5)
    torch.testing.assert_close(present(table.exp_avg).double(), dense.m, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(present(table.exp_avg_sq).double(), dense.v, rtol=1e-4, atol=1e-12)
    assert torch.equal(lazy, table.values) == (betas[0] == 0 or sweep < 1)
    assert not table.missed(torch.arange(SLOTS)).any()


@pytest.mark.parametrize("last", [1, 1000])
@pytest.mark.parametrize("betas", [[0.9, 0.999], [0.5, 0.9], [0.95, 0.98]], ids=str)
def test_bound_of_a_long_catch_up(betas: list[float], last: int) -> None:
    """What is left out after `replayed` updates is below a fp32 number's resolution."""
    rule = Adam.of(settings(betas=betas, optimizer="adam", lr=1.0))
    assert Adam.of(settings(stale="catch_up")).replayed == 221
    ratio = torch.tensor([[1.0, 0.1, 7.0]])
    v = torch.full((1, 3), 1e-6)
    m = ratio * v.sqrt()
    exact = torch.zeros(1, 3).double()
    for i in range(1, 3000):
        size, eps = rule.steps(torch.tensor(last + i))
        exact -= size * betas[0] ** i * m / (betas[1] ** (i / 2) * v.double().sqrt() + eps)
    missed = torch.tensor([2999]).int()
    found = rule.drift(m, v, torch.tensor([last]).int(), missed)
    assert ((found - exact).abs() < 3e-6 * exact.abs()).all()
    # The same, rounded by nothing: only the terms left out.
    left_out = torch.arange(rule.replayed + 1, 3000)
    sizes = rule.steps(last + left_out)[0]
    assert (sizes * (betas[0] / math.sqrt(betas[1])) ** left_out).sum() < 2.0**-30 * sizes.max()


def test_clipping() -> None:
    """By the norm of one table's scaled gradient, as torch clips, before Adam sees it."""
    given = reads(1)
    gradient = dense_gradient(given)
    norm = 0.25 * gradient.norm().item()
    for limit, factor in ((norm / 3, 1 / 3), (norm * 2, 1.0)):
        table, optimizer = make(clip_norm=limit)
        backward(table, given)
        assert optimizer.update(0.25).norms[0] == pytest.approx(norm, rel=1e-6)
        close(present(table.exp_avg), 0.1 * 0.25 * factor * gradient, 1e-5)
    table, optimizer = make()
    backward(table, given)
    assert optimizer.update(0.25).norms[0] == pytest.approx(norm, rel=1e-5)


def test_scale_drop_and_the_number_of_updates() -> None:
    table, optimizer = make()
    wanted, plain = make()
    for update in range(3):
        given = reads(update)
        backward(wanted, given)
        plain.step()
        given.upstream *= 1024
        backward(table, given)
        if update == 1:
            before = state(table)
            optimizer.drop()
            assert table.gradient.bytes == 0
            assert all(torch.equal(a, b) for a, b in zip(state(table), before, strict=True))
            backward(table, given)
        optimizer.update(1 / 1024)
    for mine, theirs in zip(state(table), state(wanted), strict=True):
        assert torch.equal(mine, theirs)
    assert table.updates == 3
    assert table.last_step.max() == 3
    # Without a backward: an update with no slots.
    assert optimizer.update().rows == [0]
    assert table.updates == 4


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite(number: float) -> None:
    tables = [make_table(), make_table(seed=9)]
    optimizer = SparseValueOptimizer.of(tables[0].config, tables)
    for table in tables:
        backward(table, reads(0))
    assert optimizer.finite()
    optimizer.update()
    before = [state(table) for table in tables]
    wrong = reads(1)
    wrong.upstream[3, 4] = number
    backward(tables[0], reads(1))
    backward(tables[1], wrong)
    assert not optimizer.finite()
    with pytest.raises(DistlmError, match=r"layer 4 is infinite or NaN at its update 2") as caught:
        optimizer.update()
    assert caught.value.shared
    assert all(
        torch.equal(a, b) for t, old in zip(tables, before, strict=True) for a, b in zip(state(t), old, strict=True)
    )
    # Summed early, too.
    tables[1].gradient.limit = 1
    backward(tables[1], wrong)
    assert not optimizer.finite()
    optimizer.drop()
    assert optimizer.finite()
    backward(tables[0], reads(1))
    assert optimizer.update().rows[1] == 0


@pytest.mark.parametrize("width", [1, 5, WIDTH])
@pytest.mark.parametrize(
    "changes",
    [{}, {"clip_norm": 1.0}, {"row_steps": True}, {"moments": "bf16"}, {"stale": "catch_up", "optimizer": "adam"}],
    ids=str,
)
@pytest.mark.parametrize("sweep", [0.0, 2.0])
def test_pieces_and_columns_do_not_show(
    changes: dict[str, object], width: int, sweep: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some hundred slots in pieces of 64, and in one; a cut of the columns and the whole: the same bits."""
    results = []
    for buffer, columns in ((1, WIDTH // width), (1 << 20, 1)):
        monkeypatch.setattr(lookup, "_BUFFER", buffer)
        parts = [make(sub_keys=20, columns=columns, column=column, **changes) for column in range(columns)]
        for _, optimizer in parts:
            optimizer.sweep = sweep
        # What a column's rank needs of the others for the norm is taken from the whole, which is no cut.
        squares: list[Tensor] = []
        for update in range(4):
            given = reads(update, slots=400, tokens=60)
            for table, _ in parts:
                table.gradient.add(given.slots, given.weights, given.upstream[:, table.first : table.last].contiguous())
            if columns > 1 and "clip_norm" in changes:
                squares = [_squares(table, given) for table, _ in parts]
            for table, optimizer in parts:
                if squares:
                    monkeypatch.setattr(table.exchange, "gather_tokens", lambda x, what, all=squares: torch.cat(all))
                else:
                    monkeypatch.setattr(table.exchange, "gather_tokens", lambda x, what: x)
                assert optimizer.update(0.5).rows[0] > 128
        planes = zip(*(state(table)[:3] for table, _ in parts), strict=True)
        results.append([torch.cat(plane, 1) for plane in planes])
    for mine, wanted in zip(*results, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("changes", [{}, {"row_steps": True}, {"clip_norm": 1.0}, {"moments": "bf16"}], ids=str)
def test_threads_and_early_sums_do_not_show(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, also of the norm that clips, whatever share of the rows a thread has; early sums or none."""
    monkeypatch.setattr(kernels, "_BLOCKS_A_THREAD", 1)
    results = []
    before = torch.get_num_threads()
    for threads, limit in ((1, 1 << 40), (3, 1 << 40), (2, 1)):
        torch.set_num_threads(threads)
        table, optimizer = make(sub_keys=20, **changes)
        table.gradient.limit = limit
        for update in range(4):
            for micro in range(2):
                given = reads(2 * update + micro, slots=400, tokens=60)
                table.gradient.add(given.slots, given.weights, given.upstream)
            norm = optimizer.update(0.5).norms[0]
        results.append([*state(table), torch.tensor([norm if "clip_norm" in changes else 0.0])])
    torch.set_num_threads(before)
    for other in results[1:]:
        for mine, wanted in zip(other, results[0], strict=True):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("form", ["adam", "sparse_adam"])
def test_both_ways_agree(form: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = []
    for available in (way == "compiled", way != "compiled"):
        monkeypatch.setattr(kernels, "AVAILABLE", available)
        table, optimizer = make(sub_keys=20, optimizer=form, clip_norm=0.5)
        for update in range(6):
            backward(table, reads(update, slots=400, tokens=60))
            optimizer.update()
        tables.append(state(table))
    for mine, theirs in zip(*tables, strict=True):
        close(mine, theirs)
    assert not torch.equal(tables[0][0], make(sub_keys=20)[0].values)


def _squares(table: object, given: object) -> Tensor:
    """Column sums of squares of the gradient, the way the optimizer takes them."""
    copy = make_table(sub_keys=20)
    copy.gradient.add(given.slots, given.weights, given.upstream)  # type: ignore[attr-defined]
    total = torch.zeros(WIDTH, dtype=torch.float64)
    for _, gradient in present(copy.gradient.take()).by_pieces(64):
        lookup.add_column_squares_(total, gradient)
    return total[table.first : table.last]  # type: ignore[attr-defined]


def test_frozen_values_stay() -> None:
    table, optimizer = make(frozen=True)
    before = table.values.clone()
    backward(table, reads(1))
    assert optimizer.update().rows == [0]
    assert torch.equal(table.values, before)
    assert table.exp_avg is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": [0.9]}, r"memory\.betas=\[0\.9\]"),
        ({"betas": [0.9, 1.0]}, r"memory\.betas"),
        ({"eps": 0.0}, r"memory\.eps=0\.0"),
        ({"lr": -1.0}, r"memory\.lr=-1\.0"),
        ({"clip_norm": -1.0}, r"memory\.clip_norm"),
        ({"stale": "catch_up", "row_steps": True}, r"row_steps=True: contradicts memory\.stale=catch_up"),
        ({"stale": "catch_up", "betas": [0.99, 0.9]}, "β₁ below √β₂"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DistlmError, match=message):
        make_table(**changes)


def test_a_new_start_knows_what_is_stale() -> None:
    """After moments were forgotten in a table that had just been swept, its slots become stale as any."""
    table, optimizer = make(stale="catch_up")
    optimizer.sweep = 0.0
    for update in range(4):
        backward(table, reads(update))
        optimizer.update()
    assert not table.has_stale
    table.forget()
    fresh, other = make(stale="catch_up")
    fresh.values.copy_(table.values)
    optimizer.sweep = 2.0
    for update in range(4):
        given = reads(update, share=0.2)
        assert torch.equal(backward(table, given)[0], backward(fresh, given)[0])
        optimizer.update()
        other.step()
    assert table.has_stale
    assert torch.equal(table.values, fresh.values)
