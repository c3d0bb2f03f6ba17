"""Memories in exported folders: values cut over files, read part by part, and never dropped in silence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from support.finetune import pretrained
from torch import Tensor

from distlm.memory.config import MemoryConfig
from distlm.memory.inference import MemoryReader
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.files import load_table
from distlm.memory.values.table import ValueTable
from distlm.models.export import memory as memories
from distlm.models.export import weights
from distlm.models.plm.export.read import from_pretrained
from distlm.models.plm.export.write import save_pretrained
from distlm.models.plm.io import load_plm

AUTO = transformers.AutoModelForMaskedLM


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-00000007"


def tokens() -> Tensor:
    return torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


@pytest.mark.parametrize("stale", ["lazy", "catch_up"])
def test_values_lie_in_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: str) -> None:
    run = pretrained(tmp_path / "run", "pkm", stale=stale)
    whole = load_plm(checkpoint(run))[0]
    wanted = {layer: memory.table.values for layer, memory in whole.memories.items()}
    # 64 slots of 32 numbers are 8 KiB.
    for module in (memories, weights):
        monkeypatch.setattr(module, "LIMIT", 3000)
    read: list[int] = []
    load = memories.load_table

    def watched(table: ValueTable, *given: Any, **named: Any) -> dict[str, Tensor]:
        read.append(table.values.shape[1])
        return load(table, *given, **named)

    monkeypatch.setattr(memories, "load_table", watched)
    model = load_plm(checkpoint(run), values=False)[0]
    save_pretrained(model, tmp_path / "hf", checkpoint=checkpoint(run))
    assert all(not memory.table.values.any() for memory in model.memories.values())
    # Four parts of eight columns, one for the statistics.
    assert sorted(read) == [1, 1, *[8] * 8]
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("model-*-of-*.safetensors"))
    assert {*index["weight_map"].values()} == {file.name for file in files} and len(files) > 8
    for file in files:
        with safe_open(file, "pt") as held:
            sizes = [held.get_tensor(name).nbytes for name in held.keys()]  # noqa: SIM118
            assert sum(sizes) <= 3000 or len(sizes) == 1
    found = AUTO.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    for layer, values in wanted.items():
        reader = found.bert.encoder.layer[layer - 1].output.memory
        assert len(reader.values) == 4 and torch.equal(torch.cat([*reader.values], 1), values)
    # Read again by distlm, the whole table and other cuts of it.
    again = from_pretrained(tmp_path / "hf")
    for layer, memory in again.memories.items():
        assert torch.equal(memory.table.values, wanted[layer])
        for column, columns in ((0, 2), (1, 2), (5, 16)):
            some = Exchange.alone()
            some.columns, some.column = columns, column
            table = ValueTable(memory.config, 32, layer, 0, some)
            load_table(table, tmp_path / "hf", layer, moments=False)
            assert torch.equal(table.values, wanted[layer][:, table.first : table.last])


@pytest.mark.parametrize(("limit", "parts"), [(4 * 64 * 30, 1), (4 * 64 * 29, 2), (4 * 64 * 8, 5), (1, 30)])
def test_a_tensor_without_a_divisor_of_its_width_is_cut_finer(
    limit: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memories, "LIMIT", limit)
    assert memories.value_parts(MemoryConfig(sub_keys=8), 30) == parts


def test_without_the_code_a_memory_is_not_dropped(tmp_path: Path) -> None:
    save_pretrained(load_plm(checkpoint(pretrained(tmp_path / "run")))[0], tmp_path / "hf")
    with pytest.raises(ValueError, match=r"trust_remote_code|does not recognize"):
        AUTO.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    (tmp_path / "hf" / "modeling_distlm.py").unlink()
    with pytest.raises((ValueError, OSError), match=r"modeling_distlm\.py|distlm_bert"):
        AUTO.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "distlm_bert"


def test_transformers_saves_and_loads_it_with_its_memory(tmp_path: Path) -> None:
    save_pretrained(load_plm(checkpoint(pretrained(tmp_path / "run")))[0], tmp_path / "hf")
    model = AUTO.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    again = AUTO.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(again), logits(model))
    with torch.no_grad():
        again.bert.encoder.layer[0].output.memory.values[0].zero_()
    assert not torch.allclose(logits(again), logits(model))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("columns", "gated"), [([16], False), ([4, 12], False), ([16], True)])
def test_the_reader_is_the_memory_in_evaluation(norm: bool, columns: list[int], gated: bool) -> None:
    config = MemoryConfig(sub_keys=9, heads=2, k=5, key_width=8, query_norm=norm, gated=gated)
    ours = ProductKeyMemory.of(config, 16, 1, 3, Exchange.alone()).eval()
    settings = vars(config) | {"value_columns": columns}
    reader = MemoryReader(settings, 16)
    statistics = ours.extra_state_tensors()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            reader.get_parameter(memories.NAMES[name]).copy_(parameter.uniform_(-1, 1))
        if norm:
            assert ours.retrieval.norm is not None
            ours.retrieval.norm.running_mean.uniform_(-1, 1)
            reader.norm_mean.copy_(ours.retrieval.norm.running_mean)
        for part, values in zip(reader.values, ours.table.values.split(columns, 1), strict=True):
            part.copy_(values)
    x = torch.randn(2, 5, 16, requires_grad=True)
    torch.testing.assert_close(reader(x), ours(x), rtol=0, atol=1e-6)
    # What trains it further: the same gradient of the input and of the keys.
    found = torch.autograd.grad(reader(x).square().sum(), [x, reader.keys])
    wanted = torch.autograd.grad(ours(x).square().sum(), [x, ours.retrieval.keys])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert statistics.keys() >= ({"norm.running_mean"} if norm else set())


def test_values_that_layers_share_are_there_once() -> None:
    settings = vars(MemoryConfig(sub_keys=9, heads=2, k=5, key_width=8)) | {"value_columns": [16]}
    first = MemoryReader(settings, 16)
    second = MemoryReader(settings, 16, first.values)
    torch.nn.init.normal_(first.values[0])
    assert not any(name.startswith("values") for name, _ in second.named_parameters())
    x = torch.randn(2, 16)
    second.load_state_dict({name: value for name, value in first.state_dict().items() if "values" not in name})
    assert torch.equal(second(x), first(x))
