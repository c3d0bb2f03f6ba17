"""A memory as a module of torch: plain keywords, saved and loaded, copied, cast, of any shape of input."""

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from support.present import present
from torch import Tensor, nn

from distlm.errors import UsageError
from distlm.memory.config import MemoryConfig
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.values import kernels
from distlm.memory.values.optimizer import SparseValueOptimizer

WIDTH = 8
SETTINGS: dict[str, Any] = {"sub_keys": 6, "heads": 3, "k": 4, "key_width": 4}


class Toy(nn.Module):
    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.first, self.memory = nn.Linear(WIDTH, WIDTH), ProductKeyMemory(WIDTH, **SETTINGS | changes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.memory(self.first(x))
        return out


def batch(seed: int = 0) -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def trained(updates: int = 4, sub_keys: int = 6, **options: Any) -> Toy:
    model = Toy(seed=1, sub_keys=sub_keys)
    rest = torch.optim.Adam(model.parameters(), lr=0.01)
    values = SparseValueOptimizer(model, lr=0.01, **options)
    values.sweep = 2.0
    for update in range(updates):
        model(batch(update)).square().mean().backward()
        for optimizer in (rest, values):
            optimizer.step()
            optimizer.zero_grad()
    return model


def evaluated(model: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(batch(9) if x is None else x)
    model.train()
    return out


def test_keywords_are_the_settings_and_have_their_defaults() -> None:
    own = inspect.signature(ProductKeyMemory).parameters
    settings = MemoryConfig()
    for name in set(own) - {"width", "seed", "layer", "exchange"}:
        assert own[name].default == getattr(settings, name), name
    assert ProductKeyMemory(WIDTH, **SETTINGS, norm_momentum=0.3).config == MemoryConfig(
        kind="pkm", **SETTINGS, norm_momentum=0.3
    )
    with pytest.raises(UsageError, match=r"memory\.k=7"):
        ProductKeyMemory(WIDTH, sub_keys=6, k=7)
    with pytest.raises(TypeError, match="lr"):
        ProductKeyMemory(WIDTH, lr=0.1)  # type: ignore[call-arg]


def test_without_a_seed_it_starts_as_torchs_layers_do() -> None:
    torch.manual_seed(0)
    first, second = Toy(), Toy()
    torch.manual_seed(0)
    again = Toy()
    assert torch.equal(again.memory.table.values, first.memory.table.values)
    assert torch.equal(again.memory.retrieval.keys, first.memory.retrieval.keys)
    assert not torch.equal(second.memory.table.values, first.memory.table.values)
    assert torch.equal(Toy(seed=3).memory.table.values, Toy(seed=3).memory.table.values)
    assert not torch.equal(Toy(seed=3, layer=1).memory.table.values, Toy(seed=3).memory.table.values)


def test_any_number_of_dimensions() -> None:
    memory, x = ProductKeyMemory(WIDTH, **SETTINGS, seed=1), torch.randn(2, 3, 5, WIDTH)
    out = memory(x)
    assert out.shape == x.shape
    for shape in [(30, WIDTH), (6, 5, WIDTH), (1, 30, WIDTH)]:
        assert torch.equal(memory(x.view(shape)), out.view(shape))
    assert torch.equal(memory.eval()(x[0, 0, 0]), memory(x)[0, 0, 0])
    with pytest.raises(ValueError, match=r"width is 8, its input is \[2, 3, 7\]"):
        memory(torch.randn(2, 3, 7))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"moments": "bf16"}, {"stale": "catch_up"}], ids=str)
def test_a_batch_without_tokens(options: dict[str, Any], compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of torch's layers: a router may send a memory no token, and a filter leave a batch none."""
    if not compiled:
        monkeypatch.setattr(kernels, "loops_of", lambda _: None)
    drops = {"input_dropout": 0.1, "query_dropout": 0.1, "value_dropout": 0.1}
    model = Toy(seed=1, **drops)
    values = SparseValueOptimizer(model, lr=0.01, **options)
    before = model.memory.table.values.clone()
    for shape in ((0, WIDTH), (2, 0, WIDTH), (0, 3, WIDTH)):
        x = torch.zeros(shape, requires_grad=True)
        out = model(x)
        out.sum().backward()
        values.step()
        assert out.shape == present(x.grad).shape == shape and model.eval()(x).shape == shape
        model.train()
    assert torch.equal(model.memory.table.values, before) and model.memory.table.updates == 3
    # Beside batches that have some.
    for x in (batch(), batch()[:0]):
        model(x).square().sum().backward()
        values.step()
    assert model.memory.table.values.isfinite().all() and not torch.equal(model.memory.table.values, before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"norm_momentum": 10.0}, "norm_momentum"), ({"k": 0}, "k"), ({"value_dropout": 1.0}, "value_dropout")],
)
def test_settings_that_cannot_work(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=rf"^memory\.{said}="):
        Toy(**changes)


def test_what_is_loaded_gives_the_same_bits() -> None:
    model, fresh = trained(), Toy(seed=2)
    assert not torch.equal(evaluated(fresh), evaluated(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(evaluated(fresh), evaluated(model))
    held = model.state_dict()["memory.table.values"]
    assert held.data_ptr() == model.memory.table.values.data_ptr(), "a copy of the table"
    assert present(model.memory.retrieval.norm).running_mean.abs().max() > 0.01


@pytest.mark.parametrize("form", ["sparse_adam", "adam"])
def test_moves_that_are_owed_are_saved(form: str) -> None:
    """catch_up: what is read is not what is in the table."""
    model = trained(7, 32, stale="catch_up", form=form)
    table = model.memory.table
    assert table.has_stale and (table.missed(table.all_rows()) > 0).any()
    fresh, settled = Toy(seed=2, sub_keys=32), copy.deepcopy(model)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(evaluated(fresh), evaluated(model))
    settled.memory.table.settle()
    assert not torch.equal(settled.memory.table.values, table.values)
    # Once they are made, the values are all there is; also for a table that owed something before.
    assert set(settled.memory.table.state_dict()) == {"values", "columns"}
    for target in (Toy(seed=2, sub_keys=32), fresh):
        target.load_state_dict(settled.state_dict())
        assert torch.equal(evaluated(target), evaluated(settled))
    # An optimizer that is lazy goes on from where they lead.
    fresh.load_state_dict(model.state_dict())
    SparseValueOptimizer(fresh)
    assert torch.equal(fresh.memory.table.values, settled.memory.table.values)
    part = {name: tensor for name, tensor in model.state_dict().items() if "exp_avg_sq" not in name}
    with pytest.raises(RuntimeError, match="exp_avg_sq: missing beside exp_avg"):
        fresh.load_state_dict(part, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_a_memory_without_values_is_refused(strict: bool) -> None:
    model, fresh = trained(), Toy(seed=2)
    without = {name: tensor for name, tensor in model.state_dict().items() if name != "memory.table.values"}
    before = fresh.memory.table.values.clone()
    with pytest.raises(RuntimeError, match=r"memory\.table\.values: missing beside memory\.retrieval"):
        fresh.load_state_dict(without, strict=strict)
    assert torch.equal(fresh.memory.table.values, before)


def test_the_weights_of_a_model_without_memory() -> None:
    model = Toy(seed=1)
    dense = {name: tensor for name, tensor in model.state_dict().items() if "memory" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*memory\.table\.values"):
        model.load_state_dict(dense)
    with pytest.warns(UserWarning, match="nothing of the memory memory; it stays as it was"):
        found = model.load_state_dict(dense, strict=False)
    assert "memory.table.values" in found.missing_keys


def test_values_that_do_not_fit() -> None:
    model = Toy(seed=1)
    state = model.state_dict()
    for changed, message in [
        (
            {"memory.table.values": torch.zeros(49, WIDTH)},
            r"values is \[49, 8\].*this rank has columns 0 to 8 of 8, \[36",
        ),
        ({"memory.table.values": torch.zeros(36, 4)}, r"values is \[36, 4\], columns 0 to 8 of 8; this rank"),
        ({"memory.table.columns": torch.tensor([0, 8, 16])}, r"columns 0 to 8 of 16; this rank has .* another width"),
        ({"memory.table.other": torch.zeros(1)}, r"Unexpected key.*memory\.table\.other"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({**state, **changed})
    half = {**state, "memory.table.values": torch.zeros(36, 4)}
    del half["memory.table.columns"]
    with pytest.raises(RuntimeError, match="no `columns` says which of 8 columns"):
        model.load_state_dict(half)


def test_cast_and_moved() -> None:
    model = trained()
    before = model.memory.table.values.clone()
    factor = model.memory.table.gradient.factor
    model.half().to("cpu")
    assert torch.equal(model.memory.table.values, before) and before.dtype == torch.float32
    assert present(model.memory.retrieval.norm).running_mean.dtype == torch.float32
    assert model.first.weight.dtype == model.memory.retrieval.keys.dtype == torch.float16
    assert model.memory.table.gradient.factor is factor
    assert evaluated(model, batch(9).half()).dtype == torch.float16
    model.to("meta")
    assert model.memory.table.values.is_meta and model.memory.table.gradient.factor.is_meta


def test_deepcopy_and_pickle() -> None:
    model, optimizer = Toy(seed=1), None
    optimizer = SparseValueOptimizer(model, lr=0.01)
    model(batch()).sum().backward()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin, twins_optimizer = copy.deepcopy((model, optimizer))
    for other in (copy.deepcopy(model), twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(evaluated(other), evaluated(model))
        assert other.memory.table.gradient.empty and other.memory.table.gradient.factor.grad is None
    before = model.memory.table.values.clone()
    # Copied together, they belong together; and the first two are left alone.
    twin(batch()).sum().backward()
    twins_optimizer.step()
    assert not torch.equal(twin.memory.table.values, before)
    assert torch.equal(model.memory.table.values, before) and not model.memory.table.gradient.empty
    optimizer.step()
    assert torch.equal(model.memory.table.values, twin.memory.table.values)


def test_others_do_not_see_the_values() -> None:
    model = trained()
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert not {name for name in names if "table" in name}
    assert names < set(model.state_dict())
