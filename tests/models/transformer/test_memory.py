"""A transformer with product-key memory: what it computes, what it starts from, what does not depend on the cut."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY
from support.config import config_of, run_of
from torch import Tensor

from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.memory.placing import placed
from distlm.models.described import model_of, parameter_count, value_bytes
from distlm.models.row_dropout import row_keys
from distlm.models.transformer.config import TransformerConfig, TransformerModel, TransformerRun
from distlm.models.transformer.model import TransformerLM
from distlm.training.memory.objective import MemoryModule, objective_of
from distlm.training.objective import TrainModule

WORDS, LAYERS, WIDTH = 60, 3, 32
SMALL = TransformerConfig(
    layers=LAYERS, width=WIDTH, heads=2, ffn_width=48, cutoffs=[20, 40], dropout=0.2, attention_dropout=0.1,
    activation_dropout=0.1, softmax_dropout=0.2, max_positions=32,
)  # fmt: skip
MEMORY = MemoryConfig(kind="resm", positions=[1, 3], sub_keys=8, heads=2, k=4, key_width=8, value_dropout=0.1)
TAP = "last_ffn_input"


def described(**changes: Any) -> TransformerModel:
    memory = placed(dataclasses.replace(MEMORY, **changes), LAYERS)
    return TransformerModel(**dataclasses.asdict(SMALL), memory=memory, seed=3)


def made(description: TransformerConfig) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(description, WORDS)


def batch(rows: int = 4, tokens: int = 16) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(4, WORDS, (rows, tokens + 1), generator=drawn)
    return ids[:, :-1], ids[:, 1:]


def nats(model: TransformerLM) -> Tensor:
    return objective_of(model, TAP).eval()(*batch()).ce


@pytest.mark.parametrize("gated", [False, True])
def test_a_memory_of_zeros_beside_the_ffn_starts_at_the_dense_loss(gated: bool) -> None:
    dense, model = made(SMALL), made(described(values="zero", gated=gated))
    own = dict(model.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in dense.named_parameters())
    assert torch.equal(nats(dense), nats(model))
    assert not torch.equal(nats(dense), nats(made(described(gated=gated))))


def test_pkm_stands_in_the_place_of_the_ffn() -> None:
    model = made(described(kind="pkm", positions=[]))
    names = [name for name, _ in model.named_parameters()]
    assert list(model.memories) == [2]
    assert not any(name.startswith(model.ffn_names[2]) for name in names)
    assert any(name.startswith(model.ffn_names[1]) for name in names)
    seen: list[Tensor] = []
    model.memories[2].register_forward_hook(lambda _module, given, output: seen.extend([given[0], output]))
    model.layers[1].register_forward_hook(lambda _module, _given, output: seen.append(output))
    states: list[Tensor] = []
    norm: Any = model.layers[1].ffn_norm
    norm.register_forward_hook(lambda _module, given, output: states.extend([given[0], output]))
    model.eval()(batch()[0])
    assert torch.equal(seen[0], states[1]) and torch.equal(seen[2], states[0] + seen[1])


def test_layers_share_values_and_nothing_else() -> None:
    model = made(described(shared=True, gated=True))
    one, other = model.memories[1], model.memories[3]
    assert one.table is other.table and not torch.equal(one.retrieval.keys, other.retrieval.keys)
    apart = made(described(gated=True))
    assert torch.equal(apart.memories[1].table.values, one.table.values)
    assert value_bytes(described(shared=True)) * 2 == value_bytes(described())
    assert parameter_count(described(shared=True), WORDS) == parameter_count(described(), WORDS)
    # Both layers' reads are in one gradient of the values.
    objective = objective_of(model.train(), TAP)
    objective.loss(objective(*batch(), None, None, row_keys(1, 0, range(4))), 1.0).backward()
    sums = one.table.gradient.take()
    assert sums is not None
    reads = torch.cat([memory.usage.counts().reads.nonzero() for memory in (one, other)]).unique()
    assert torch.equal(sums.rows.long(), reads)


@pytest.mark.parametrize("scored", [False, True])
def test_dropout_belongs_to_rows(scored: bool) -> None:
    """A row's loss is the same, whichever rows are computed beside it (the query norm is left out)."""
    model = made(described(query_norm=False)).train()
    objective, (inputs, targets) = objective_of(model, TAP), batch()
    assert isinstance(objective, MemoryModule)
    mask = torch.ones_like(inputs, dtype=torch.bool) if scored else None
    if mask is not None:
        mask[3, 9:] = False
    keys = row_keys(1, 7, range(4))
    whole = objective(inputs, targets, mask, None, keys).ce
    parts = [
        objective(inputs[part], targets[part], None if mask is None else mask[part], None, keys[part]).ce
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert torch.isclose(whole, sum(parts, torch.zeros(())), rtol=1e-6)
    assert not torch.isclose(whole, objective(inputs, targets, mask, None, row_keys(1, 8, range(4))).ce, rtol=1e-6)


def test_without_a_memory_the_objective_and_the_description_are_as_ever() -> None:
    config = run_of(TransformerRun, config_of("demo", TINY))
    assert type(objective_of(made(SMALL), TAP)) is TrainModule and type(model_of(config)) is TransformerConfig


@pytest.mark.parametrize(("settings", "words"), [
    (["memory.kind=pkm", "memory.positions=[3]"], "the model has the layers 1 to model.layers=2"),
    (["memory.kind=pkm", "memory.positions=[2,1]"], "rising"),
    (["memory.kind=pkm", "memory.columns=3"], "must divide the model's width, model.width=32"),
    (["memory.kind=pkm", "memory.k=600"], "memory.k"),
    (["memory.kind=pkm", "train.regulariser=queue"], "set train.regulariser=l2"),
    (["memory.kind=resm", "memory.fresh_ffn=true"], "train.init_from="),
    (["memory.kind=pkm", "memory.value_dropout=1.5"], "memory.value_dropout"),
])  # fmt: skip
def test_what_cannot_work_is_refused_by_name(settings: list[str], words: str) -> None:
    with pytest.raises(DistlmError, match=words):
        config_of("demo", [*TINY, *settings])


def test_a_kind_without_memory_refuses_the_section() -> None:
    with pytest.raises(DistlmError, match="memory"):
        config_of("awd-lstm-small", ["memory.kind=pkm"])


def test_the_middle_layer_is_the_default(tmp_path: Path) -> None:
    for layers, middle in ((1, 1), (2, 2), (3, 2), (4, 3), (6, 4), (16, 9)):
        assert placed(MemoryConfig(kind="pkm", positions=[]), layers)["positions"] == [middle]
