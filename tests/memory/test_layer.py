"""The memory layer on one rank against its definition, slot by slot; its parts beside the parameters; its size."""

import dataclasses
from typing import Any

import pytest
import torch
from support.present import present
from torch import Tensor

from distlm.memory.config import MemoryConfig
from distlm.memory.layer import MemorySize, ProductKeyMemory, memory_size
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.optimizer import SparseValueOptimizer

WIDTH = 8
SMALL = MemoryConfig(kind="resm", sub_keys=6, heads=3, k=4, key_width=4)


def make(seed: int = 1, layer: int = 4, dropout: Any = None, **changes: Any) -> ProductKeyMemory:
    config = dataclasses.replace(SMALL, **changes)
    rest: dict[str, Any] = {} if dropout is None else {"dropout": dropout}
    return ProductKeyMemory.of(config, WIDTH, layer, seed, Exchange.alone(), **rest)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, 4:] = False
    return x, mask


def by_definition(memory: ProductKeyMemory, x: Tensor, mask: Tensor) -> Tensor:
    """Every score, a softmax over the k highest of each head, the heads summed; x [B, T, D]."""
    rows, tokens, width = x.shape
    q = memory.retrieval.query(x.view(-1, width))
    counts = mask.view(-1)
    q = (q - q[counts].mean(0)) / (q[counts].var(0, unbiased=False) + 1e-5).sqrt()
    norm = present(memory.retrieval.norm)
    q = (q * norm.weight + norm.bias).view(len(q), SMALL.heads, 2, -1)
    halves = torch.einsum("thsd,hsnd->thsn", q, memory.retrieval.keys)
    scores = (halves[:, :, 0, :, None] + halves[:, :, 1, None]).flatten(2)
    lowest = scores.topk(SMALL.k).values[..., -1:]
    weights = torch.where(scores >= lowest, scores, -torch.inf).softmax(2)
    return (weights.sum(1) @ memory.table.values).view(rows, tokens, width)


def test_output_and_gradients_are_those_of_the_definition() -> None:
    memory, (x, mask) = make(), batch()
    with torch.no_grad():
        present(memory.retrieval.norm).weight.uniform_(0.5, 2)
    upstream = torch.randn_like(x)
    found = []
    for function in (memory, lambda x, mask: by_definition(memory, x, mask)):
        memory.zero_grad()
        given = x.clone().requires_grad_()
        out = function(given, mask)
        out.backward(upstream)
        found.append([out.detach(), given.grad, *(present(p.grad).clone() for p in memory.parameters())])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
        assert wanted.abs().max() > 0.01 or wanted.shape == memory.retrieval.query.bias.shape


def test_the_gated_output_is_berges_and_others() -> None:
    """W₂(memory(x) ⊙ SiLU(W₁ x)), with the same values, keys and queries as without the gate."""
    memory, (x, mask) = make(gated=True), batch()
    gate = present(memory.gate)
    plain = make()(x, mask)
    given = x @ gate.gate.weight.T
    wanted = (plain * given * torch.sigmoid(given)) @ gate.out.weight.T
    assert torch.allclose(memory(x, mask), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(gate.gate.weight, present(make(gated=True).gate).gate.weight)
    assert not torch.equal(gate.gate.weight, gate.out.weight)
    assert memory_size(memory.config, WIDTH).gate == 2 * WIDTH**2


def test_masks() -> None:
    """The mask reaches the norm; which reads are counted may be said apart."""
    memory, (x, mask) = make(), batch()
    everything = memory(x)
    assert torch.equal(everything, make()(x, torch.ones_like(mask)))
    assert not torch.equal(everything, make()(x, mask))
    assert int(memory.usage.counts().reads.sum()) == 15 * SMALL.heads * SMALL.k
    memory.usage.reset()
    memory(x, mask)
    assert int(memory.usage.counts().top1.sum()) == 12 * SMALL.heads
    memory.usage.reset()
    counted = mask.clone()
    counted[:, 0] = False
    memory(x, mask, counted)
    assert int(memory.usage.counts().top1.sum()) == 9 * SMALL.heads


def test_reads_are_dated_as_the_values_are() -> None:
    memory = make(sub_keys=32)
    optimizer = SparseValueOptimizer.of(memory.config, [memory.table])
    for update in (1, 2, 3):
        memory.update = update
        memory(batch(update)[0]).sum().backward()
        optimizer.update()
    assert torch.equal(memory.usage.counts().last_read, memory.table.last_step)
    assert memory.table.last_step.unique().tolist() == [0, 1, 2, 3]
    memory.update = 7
    memory(batch()[0])
    assert memory.usage.counts().last_top1.max() == 7


def test_use_is_counted_in_training_and_where_it_is_measured() -> None:
    memory, (x, mask) = make(), batch()
    memory.eval()(x, mask)
    assert int(memory.usage.counts().reads.sum()) == 0
    with memory.measure() as measured, torch.no_grad():
        memory(x, mask)
        assert int(measured.counts().reads.sum()) == 12 * SMALL.heads * SMALL.k
    memory(x, mask)
    memory.train()(x, mask)
    assert int(measured.counts().reads.sum()) == int(memory.usage.counts().reads.sum()) == 12 * SMALL.heads * SMALL.k
    assert measured.counts().weights.sum().item() == pytest.approx(12 * SMALL.heads, rel=1e-6)


def test_dropouts_are_the_callers_and_keep_rows_apart() -> None:
    calls: list[tuple[tuple[int, ...], float, str]] = []

    def dropout(tensor: Tensor, p: float, place: str) -> Tensor:
        calls.append((tuple(tensor.shape), p, place))
        return tensor * 2 if p == 0.3 else tensor

    rates: dict[str, Any] = {"input_dropout": 0.1, "query_dropout": 0.2, "value_dropout": 0.3}
    memory, (x, mask) = make(dropout=dropout, **rates), batch()
    out = memory(x, mask)
    assert calls == [((3, 5, 8), 0.1, "input"), ((3, 5, 12), 0.2, "query"), ((3, 5, 8), 0.3, "value")]
    torch.testing.assert_close(out, 2 * make()(x, mask))
    calls.clear()
    memory.eval()(x, mask)
    make(dropout=dropout)(x, mask)
    assert not calls
    torch.manual_seed(0)
    assert make(value_dropout=0.5)(x, mask).eq(0).float().mean() == pytest.approx(0.5, abs=0.15)


def test_what_starts_a_memory_is_seed_and_layer() -> None:
    torch.manual_seed(0)
    x, mask = batch()
    out = make()(x, mask)
    torch.manual_seed(1)
    assert torch.equal(make()(x, mask), out)
    assert not torch.equal(make(seed=2).retrieval.keys, make().retrieval.keys)
    assert not torch.equal(make(layer=5).retrieval.keys, make().retrieval.keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    memory, reference, (x, mask) = make(), make(), batch()
    memory.to(dtype)
    assert memory.table.values.dtype == present(memory.retrieval.norm).running_mean.dtype == torch.float32
    for mine, theirs in zip(memory.parameters(), reference.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    x = x.to(dtype).requires_grad_()
    out = memory(x, mask)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert present(x.grad).dtype == dtype
    assert all(g.dtype == dtype and g.isfinite().all() for g in (present(p.grad) for p in memory.parameters()))
    # A few queries near a tie may choose another slot.
    error = (out.float() - reference(x.detach().float(), mask)).abs()
    assert error.median() < 0.02


@pytest.mark.parametrize("query_norm", [True, False])
def test_what_a_checkpoint_holds_beside_parameters_and_values(query_norm: bool) -> None:
    memory, (x, mask) = make(query_norm=query_norm), batch()
    for _ in range(2):
        memory(x, mask)
    tensors = memory.extra_state_tensors()
    assert len(tensors) == (7 if query_norm else 5)
    fresh = make(query_norm=query_norm)
    fresh.load_state_dict(memory.state_dict())
    fresh.load_extra(tensors)
    assert torch.equal(fresh.eval()(x, mask), memory.eval()(x, mask))
    assert fresh.usage.counts().measures() == memory.usage.counts().measures()
    for name, tensor in fresh.extra_state_tensors().items():
        assert torch.equal(tensor, tensors[name]), name
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    memory.train()(x, mask)
    assert all(torch.equal(tensors[name], before[name]) for name in before), "not copies"
    with pytest.raises(KeyError, match=r"usage\.reads"):
        fresh.load_extra({})
    assert not {name for name in memory.state_dict() if "usage" in name}


def test_size_is_what_is_built() -> None:
    for query_norm in (True, False):
        memory = make(query_norm=query_norm)
        size = memory_size(memory.config, WIDTH)
        assert size.values == memory.table.values.numel()
        assert size.keys == memory.retrieval.keys.numel()
        assert size.query == sum(p.numel() for p in memory.retrieval.query.parameters())
        parameters = sum(p.numel() for p in memory.parameters())
        assert size.keys + size.query + size.norm == parameters == size.total - size.values


def test_the_papers_model_has_515_million_numbers() -> None:
    """Kim & Jung, Table 1: BERT-base with two memories beside or in place of the feed-forward networks."""
    size = memory_size(MemoryConfig(), 768)
    assert size == MemorySize(values=201_326_592, keys=524_288, query=787_456, norm=2_048)
    bert_base, feed_forward = 109_482_240, 2 * 768 * 3072 + 3072 + 768
    assert round((bert_base + 2 * size.total) / 1e6) == 515
    # Which the paper prints as 506M.
    assert (bert_base + 2 * (size.total - feed_forward)) / 1e6 == pytest.approx(505.3, abs=0.05)
