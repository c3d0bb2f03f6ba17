"""A memory on a GPU computes what it computes on a processor: fp32 with TF32 off, and close to it in fp16.

Without a GPU the same bodies go once through torch's operations, which GPUs run, on the processor, where the reference
goes through the compiled loops.
"""

import pytest
import torch
from support.memory import Reads, backward, brute_force, make, reads
from support.sim.devices import ON_DEVICE
from torch import Tensor

from distlm.memory.config import MemoryConfig
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.norm import QueryNorm
from distlm.memory.retrieval import select
from distlm.memory.values import kernels
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.random import normal_

DEVICES = ["cpu", ON_DEVICE]
CONFIG = MemoryConfig(kind="resm", sub_keys=24, heads=3, k=6, key_width=16)
WIDTH = 64


@pytest.fixture(autouse=True)
def products_in_fp32() -> None:
    assert not torch.backends.cuda.matmul.allow_tf32, "with TF32 products have 10 bits, and no tolerance here holds"


def close(mine: Tensor, wanted: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Sums over some hundred fp32 numbers in another order."""
    torch.testing.assert_close(mine.cpu(), wanted, rtol=rtol, atol=atol)


def passed(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a fresh layer gives in one forward, under autocast unless fp32, and one backward."""
    memory = ProductKeyMemory.of(CONFIG, WIDTH, 4, 1, Exchange.alone()).to(device)
    generator = torch.Generator().manual_seed(2)
    x, upstream = (torch.randn(4, 30, WIDTH, generator=generator).to(device) for _ in range(2))
    mask = torch.arange(30, device=device).expand(4, 30) < torch.tensor([30, 30, 11, 25], device=device)[:, None]
    x.requires_grad_()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        out = memory(x, mask)
    out.backward(upstream)
    sums = memory.table.gradient.take()
    assert sums is not None and x.grad is not None and memory.retrieval.norm is not None
    values = torch.zeros_like(memory.table.values).index_copy_(0, sums.rows, sums.whole())
    found = {name: parameter.grad for name, parameter in memory.named_parameters() if parameter.grad is not None}
    found |= {"output": out.detach(), "x": x.grad, "values": values, "reads": memory.usage.counts().reads}
    return found | {"mean": memory.retrieval.norm.running_mean, "variance": memory.retrieval.norm.running_var}


@pytest.mark.parametrize("device", DEVICES)
def test_forward_and_gradients(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = passed("cpu")
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    found = passed(device)
    assert found.keys() == wanted.keys() and len(found) == 11
    assert torch.equal(found.pop("reads").cpu(), wanted["reads"]), "other slots were found"
    for name, tensor in found.items():
        # The norm takes the queries' bias away again: what is left of its gradient is rounding.
        close(tensor, wanted[name], atol=1e-3 if name == "retrieval.query.bias" else 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_fp16_autocast_is_finite_and_close(device: str) -> None:
    """Relative 2-norm: queries in fp16 put some slots of nearly equal score in each other's place."""
    wanted, found = passed("cpu"), passed(device, torch.float16)
    for name in ("output", "values", "x", "retrieval.keys", "retrieval.query.weight", "mean", "variance"):
        mine = found[name].float().cpu()
        assert mine.isfinite().all(), name
        assert (mine - wanted[name]).norm() < 0.1 * wanted[name].norm(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"optimizer": "adam"}, {"stale": "catch_up"}, {"optimizer": "adam", "stale": "catch_up"},
        {"row_steps": True}, {"optimizer": "adam", "clip_norm": 0.5}, {"width": 6}, {"width": 7},
    ],
    ids=str,
)  # fmt: skip
def test_updates(device: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight updates of some slots, the last one through all of them where it may; then every slot is caught up."""
    width = int(str(changes.get("width", 20)))
    wanted = updated("cpu", width, changes)
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    # The fewest rows at a time: several pieces, copied or in their place.
    for name in ("_BUFFER", "_BUFFER_DEVICE"):
        monkeypatch.setattr(f"distlm.memory.lookup.{name}", 1)
    found = updated(device, width, changes)
    assert len(found) == len(wanted) == 8 * 3 + 4 + ("row_steps" in changes)
    for mine, expected in zip(found, wanted, strict=True):
        if expected.dtype == torch.int32:
            assert torch.equal(mine.cpu(), expected)
        else:
            close(mine, expected, atol=1e-6)


def updated(device: str, width: int, changes: dict[str, object]) -> list[Tensor]:
    """Output, gradient of the weights and norm of the values' of each update; then the table's state."""
    table, optimizer = make(sub_keys=24, **{"width": width, **changes})
    table.to(device)
    found: list[Tensor] = []
    for update in range(8):
        given = reads(update, slots=576, tokens=60, width=width, share=0.4)
        found += backward(table, Reads(*(x.to(device) for x in (given.slots, given.weights, given.upstream))))
        if update == 7:
            optimizer.sweep = 1 / 16
        found.append(torch.tensor(optimizer.update().norms))
    table.settle()
    names = ("values", "exp_avg", "exp_avg_sq", "last_step", "row_steps")
    return found + [tensor for name in names if (tensor := getattr(table, name)) is not None]


@pytest.mark.parametrize("device", DEVICES)
def test_query_norm(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = normed("cpu")
    # A few rows at a time, wherever it runs.
    monkeypatch.setattr("distlm.memory.norm._CHUNK", {})
    monkeypatch.setattr("distlm.memory.norm._OTHER_CHUNK", 7 * WIDTH)
    for mine, expected in zip(normed(device), wanted, strict=True):
        close(mine, expected, rtol=1e-5, atol=1e-6)


def normed(device: str) -> list[Tensor]:
    """Outputs and gradients of two micro-batches with padding, the running statistics, and an output in evaluation."""
    norm = QueryNorm(WIDTH, 0.3, Exchange.alone()).to(device)
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(2):
        x, upstream = (torch.randn(40, WIDTH, generator=generator).to(device) for _ in range(2))
        x = (x * 2 + 3).requires_grad_()
        out = norm(x, torch.arange(40, device=device) % 5 > 0)
        out.backward(upstream)
        assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
        found += [out.detach(), x.grad, norm.weight.grad.clone(), norm.bias.grad.clone()]
    found += [norm.running_mean, norm.running_var]
    return [*found, norm.eval()(x.detach(), torch.ones(40, dtype=torch.bool, device=device)).detach()]


@pytest.mark.parametrize("device", DEVICES)
def test_equal_scores_give_the_lowest_slots(device: str) -> None:
    """torch.topk takes equal numbers in another order on each device; small whole numbers give many of them."""
    generator = torch.Generator().manual_seed(6)
    queries = torch.randint(-2, 3, (50, 2, 8), generator=generator).float()
    keys = torch.randint(-2, 3, (2, 2, 12, 4), generator=generator).float()
    slots, scores = select(queries.to(device), keys.to(device), 5)
    wanted, best = brute_force(queries, keys, 5)
    assert torch.equal(slots.cpu(), wanted) and torch.equal(scores.cpu(), best)


@pytest.mark.parametrize("device", DEVICES)
def test_first_values_are_the_same_bits(device: str) -> None:
    drawn = []
    for where in ("cpu", device):
        drawn.append(torch.empty(300, 37, device=where))
        normal_(drawn[-1], 1.0, 1, 2, 0)
    assert torch.equal(drawn[0], drawn[1].cpu())
