"""Masked language models: as Hugging Face computes them, with memories at chosen layers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from support.export.old import save_old
from support.present import present
from torch import Tensor

from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.memory.of_model import tables_of
from distlm.models.described import model_on_meta, parameter_count
from distlm.models.plm.config import PlmConfig
from distlm.models.plm.export import from_pretrained, save_pretrained
from distlm.models.plm.model import Plm, plm_model
from distlm.models.plm.text.masking import NO_LABEL
from distlm.models.row_dropout import row_keys

VOCABULARY, PAD = 61, 0
TINY = PlmConfig(layers=3, width=32, heads=4, ffn_width=48, max_positions=24)
MEMORY = MemoryConfig(positions=[1, 3], sub_keys=8, heads=2, k=4, key_width=8)
BACKBONES = ("bert", "distilbert", "roberta")


def build(backbone: Any = "bert", kind: Any = "none", **memory: Any) -> Plm:
    torch.manual_seed(3)
    plm = dataclasses.replace(TINY, backbone=backbone)
    return Plm(plm_model(plm, dataclasses.replace(MEMORY, kind=kind, **memory), seed=5, pad_id=PAD), VOCABULARY)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels [4, 20] and mask; rows of different lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, VOCABULARY, (4, 20), generator=generator)
    mask = torch.arange(20) < torch.tensor([20, 13, 7, 1])[:, None]
    labels = torch.where(mask & (torch.rand(4, 20, generator=generator) < 0.4), tokens, NO_LABEL)
    labels[0, 0] = 7
    return tokens.masked_fill(~mask, PAD), labels, mask


def loss_of(model: Plm, rows: slice = slice(0, 4), keys: bool = False) -> Tensor:
    tokens, labels, mask = (tensor[rows] for tensor in batch())
    with model.rows.set(row_keys(1, 1, range(rows.start, rows.stop)) if keys else None, mask):
        return model.loss_sum(model(tokens), labels)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_without_memory_it_is_hugging_faces_model(backbone: str) -> None:
    """Their eager attention and their loss over all positions, on the same weights."""
    model = build(backbone).eval()
    tokens, labels, mask = batch()
    theirs = transformers.AutoModelForMaskedLM.from_config(model.hf.config, attn_implementation="eager").eval()
    theirs.load_state_dict(model.hf.state_dict())
    expected = theirs(input_ids=tokens, attention_mask=mask.long(), labels=labels).loss
    found = loss_of(model) / (labels != NO_LABEL).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    found.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in model.hf.named_parameters():
        wanted = gradients[name].grad
        if wanted is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["none", "resm"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_row_of_padding_alone_counts_for_nothing(backbone: str, kind: str) -> None:
    """Short pieces of a padded row can hold no text: neither loss nor gradients change, and none is NaN."""
    tokens, labels, mask = batch()
    blank = torch.full_like(tokens[:2], PAD)
    found = []
    for more in (0, 2):
        model = build(backbone, kind)
        with model.rows.set(row_keys(1, 1, range(4 + more)), torch.cat([mask, blank[:more].bool()])):
            total = model.loss_sum(
                model(torch.cat([tokens, blank[:more]])), torch.cat([labels, torch.full_like(blank[:more], NO_LABEL)])
            )
        total.backward()
        found.append([total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_how_widely_fresh_weights_lie(backbone: Any) -> None:
    def stds(init_std: float) -> list[float]:
        torch.manual_seed(3)
        plm = dataclasses.replace(TINY, backbone=backbone, init_std=init_std)
        model = Plm(plm_model(plm, MemoryConfig(), seed=5, pad_id=PAD), VOCABULARY)
        return [weight.std().item() for weight in model.parameters() if weight.ndim == 2]

    assert stds(PlmConfig().init_std) == pytest.approx([0.02] * len(stds(0.02)), rel=0.2)
    assert stds(0.06) == pytest.approx([3 * std for std in stds(0.02)], rel=1e-4)


@pytest.mark.parametrize("more", [{}, {"shared": True, "gated": True}], ids=["plain", "pool"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_memory_of_zeros_leaves_the_dense_models_bits(backbone: str, more: dict[str, bool]) -> None:
    dense = build(backbone).eval()
    with_memory = build(backbone, "resm", values="zero", **more).eval()
    assert torch.equal(loss_of(dense), loss_of(with_memory))
    # And the values learn from there: their gradient does not vanish with them.
    with_memory.train()
    loss_of(with_memory, keys=True).backward()
    assert all(table.gradient.take() is not None for table in tables_of(with_memory.memories))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_where_the_memory_stands(backbone: str) -> None:
    """PKM takes the feed-forward network's place, ResM stands beside it, at layers counted from 1."""
    names = {kind: {name for name, _ in build(backbone, kind).named_parameters()} for kind in ("none", "pkm", "resm")}
    assert names["none"] < names["resm"]
    ffn = {name for name in names["none"] if any(part in name for part in (".lin", "intermediate", ".output.dense"))}
    ffn = {name for name in ffn if "attention" not in name and (".layer.0." in name or ".layer.2." in name)}
    assert len(ffn) == 8 and names["none"] - names["pkm"] == ffn
    new = names["resm"] - names["none"]
    assert new == names["pkm"] - names["none"] and all(".memory." in name for name in new)
    assert {name.split(".layer.")[1][0] for name in new} == {"0", "2"}


def test_by_hand() -> None:
    """LN(x + α·FFN(x) + β·PKM(x)) (Kim & Jung, section 3.1)."""
    model = build("bert", "resm", alpha=0.5, beta=2.0).eval()
    x, mask = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    layer = model.hf.bert.encoder.layer[2]
    with model.rows.set(None, mask), torch.no_grad():
        found = layer.feed_forward_chunk(x)
        ffn = layer.output.dense(layer.intermediate(x))
        expected = layer.output.LayerNorm(x + 0.5 * ffn + 2 * model.memories[3](x, mask))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["none", "resm"])
def test_dropout_belongs_to_rows(kind: str) -> None:
    """The loss of a batch is the sum of its rows', in training too; and it is not that of evaluation."""
    dropouts = {"input_dropout": 0.1, "query_dropout": 0.2, "value_dropout": 0.3, "query_norm": False}
    model = build("bert", kind, **dropouts).train()
    whole = loss_of(model, keys=True)
    parts = [loss_of(model, slice(first, first + 2), keys=True) for first in (0, 2)]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-6)
    assert whole.item() != pytest.approx(loss_of(model.eval()).item(), rel=1e-4)


def test_parameters_of_bert_base_are_the_papers() -> None:
    """Table 1: 110M, 506M with PKM, 515M with ResM."""
    values = 2 * 512**2 * 768
    sizes = {}
    for kind in ("none", "pkm", "resm"):
        sizes[kind] = parameter_count(plm_model(PlmConfig(), MemoryConfig(kind=kind), 1), 30522)
    assert sizes["none"] == 109_514_298
    assert round((sizes["pkm"] + values) / 1e6) in (505, 506) and round((sizes["resm"] + values) / 1e6) in (514, 515)
    model = model_on_meta(plm_model(PlmConfig(), MemoryConfig(kind="pkm"), 1), 30522)
    assert model.memory_numbers == values


@pytest.mark.parametrize("positions", [[0], [1, 4]])
def test_a_position_that_is_no_layer_is_refused(positions: list[int]) -> None:
    with pytest.raises(DistlmError, match=r"memory.positions=\[.*the model has layers 1 to 3"):
        build("bert", "pkm", positions=positions)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kind", ["none", "pkm", "resm"])
def test_hugging_face_folder_and_back(tmp_path: Path, backbone: str, kind: str) -> None:
    model = build(backbone, kind).eval()
    for memory in model.memories.values():
        present(memory.retrieval.norm).running_mean.normal_()
    save_pretrained(model, tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    assert torch.equal(loss_of(model), loss_of(again))
    if kind == "none":
        # Any program reads it.
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
        assert torch.equal(theirs.base_model.embeddings.word_embeddings.weight, model.head.weight)
    with pytest.raises(DistlmError, match="not empty"):
        save_pretrained(model, tmp_path / "model")


def test_a_memory_that_layers_share_is_there_once(tmp_path: Path) -> None:
    """In the model, in what it counts, in the folder and read back; the layers' own counters and statistics, too."""
    model = build("bert", "pkm", shared=True, gated=True).train()
    loss_of(model, keys=True)
    assert len(tables_of(model.memories)) == 1 and model.memory_numbers == 64 * 32
    save_pretrained(model.eval(), tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert len([name for name in file.keys() if ".values." in name]) == 1  # noqa: SIM118
    assert torch.equal(loss_of(model), loss_of(from_pretrained(tmp_path / "model")))
    # What older versions wrote has counters, too.
    save_old(model, tmp_path / "old")
    assert len([*(tmp_path / "old").glob("memory-*")]) == 1
    again = from_pretrained(tmp_path / "old")
    assert torch.equal(loss_of(model), loss_of(again))
    for layer, memory in model.memories.items():
        assert torch.equal(memory.usage.counts().reads, again.memories[layer].usage.counts().reads)
    assert not torch.equal(*(memory.usage.counts().reads for memory in again.memories.values()))
    apart = build("bert", "pkm", gated=True)
    assert not torch.equal(*(memory.table.values for memory in apart.memories.values()))


def test_a_folder_without_its_memory_is_refused(tmp_path: Path) -> None:
    for kind, save, name in (("resm", save_old, "memory"), ("pkm", save_pretrained, "model")):
        save(build("bert", kind), tmp_path / kind)
        (tmp_path / kind / f"{name}.safetensors").unlink()
        with pytest.raises(DistlmError, match=rf"{name}.safetensors: damaged \(missing, \d+ bytes were written\)"):
            from_pretrained(tmp_path / kind)
    save_pretrained(build("bert", "none"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(DistlmError, match="not a Hugging Face model folder"):
        from_pretrained(tmp_path / "model")
