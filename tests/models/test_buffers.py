"""Persistent buffers belong to a model's files: models of Hugging Face have some, our own kinds none."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import write_text
from support.foreign.hf import save_deepseek, save_gemma4
from support.hf.exported import exported
from support.records import alter
from torch import Tensor, nn

from distlm.data.subwords import FIRST_PIECE
from distlm.errors import DistlmError
from distlm.finetune.description import TaskModelConfig
from distlm.memory.config import MemoryConfig
from distlm.memory.placing import placed
from distlm.models.awd_lstm.config import LstmConfig
from distlm.models.buffers import kept_buffers, set_buffers, stored_tensors
from distlm.models.card import CARD, WEIGHTS, read_model_card
from distlm.models.described import build_model
from distlm.models.hf.memory import with_memory
from distlm.models.hf.model import HfLM, hf_model, pretrained
from distlm.models.io import load_model, save_model, save_weights
from distlm.models.kind import Description
from distlm.models.plm.description import PlmModel
from distlm.models.transformer.config import TransformerConfig, TransformerModel
from distlm.runtime.files import file_hash
from distlm.training.memory.start import take_dense
from distlm.training.start.init_from import take_weights

EXTRA = {"dictionary": "d", "step": 0}
MEMORY = MemoryConfig(kind="resm", positions=[1], sub_keys=8, heads=2, k=4, key_width=8)
NAMES = {
    "gemma4": ["hf.model.layers.0.layer_scalar", "hf.model.layers.1.layer_scalar"],
    "deepseek": ["hf.model.layers.1.mlp.gate.e_score_correction_bias"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HfLM]:
    text = write_text(tmp_path_factory.mktemp("buffers") / "text", train_lines=40)
    made = {}
    for name, save in (("gemma4", save_gemma4), ("deepseek", save_deepseek)):
        folder = save(text.parent / name, text)
        config = hf_model(str(folder))
        made[name] = pretrained(str(folder), config, FIRST_PIECE + config.rows)
    return made


def states(model: Any) -> Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        return model(torch.randint(FIRST_PIECE, model.vocabulary, (3, 20))).hidden


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(models: dict[str, HfLM], tmp_path: Path, name: str) -> None:
    model = models[name]
    save_model(model, tmp_path, EXTRA)
    loaded, _ = load_model(tmp_path)
    assert [*kept_buffers(loaded)] == [*kept_buffers(model)] == NAMES[name]
    assert torch.equal(states(loaded), states(model))
    # Without them it is another model.
    fresh = build_model(model.config, model.vocabulary).eval()
    for one, value in model.named_parameters():
        fresh.get_parameter(one).data = value.data
    assert not torch.allclose(states(fresh), states(model), atol=1e-2)
    assert load_file(tmp_path / WEIGHTS).keys() == stored_tensors(model).keys()


def rewritten(folder: Path, weights: dict[str, Tensor]) -> None:
    """The model folder with other tensors, whose checksum is right."""
    save_file(weights, folder / WEIGHTS)
    alter(folder / CARD, weights=file_hash(folder / WEIGHTS))


def test_missing_and_surplus_ones_are_named(models: dict[str, HfLM], tmp_path: Path) -> None:
    """A folder from before has none of them."""
    model, name = models["gemma4"], NAMES["gemma4"][1]
    with pytest.raises(ValueError, match=r"layers.0.layer_scalar \[1\] is missing"):
        save_weights(dict(model.named_parameters()), model.config, model.vocabulary, tmp_path, EXTRA)
    save_model(model, tmp_path, EXTRA)
    weights = load_file(tmp_path / WEIGHTS)
    rewritten(tmp_path, {**weights, "hf.model.layers.2.layer_scalar": torch.ones(1)})
    with pytest.raises(DistlmError, match=r"layers.2.layer_scalar \[1\] is unknown"):
        load_model(tmp_path)
    del weights[name]
    rewritten(tmp_path, weights)
    with pytest.raises(DistlmError, match=rf"{name} \[1\] is missing \(a persistent buffer, .* with another run_dir="):
        load_model(tmp_path)


def test_they_keep_their_dtype_and_stay_shared() -> None:
    class Two(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.one, self.other = nn.Module(), nn.Module()
            table = torch.full((3,), number)
            for part in (self.one, self.other):
                part.register_buffer("computed", torch.ones(2), persistent=False)
                part.register_buffer("table", table)

    first, second = Two(7), Two(0)
    assert [*kept_buffers(first)] == ["one.table"]
    set_buffers(second, kept_buffers(first))
    found = [second.get_buffer(f"{part}.table") for part in ("one", "other")]
    assert found[0] is found[1] and torch.equal(found[0], torch.tensor([7, 7, 7]))


def test_another_run_gives_them_too(models: dict[str, HfLM], tmp_path: Path) -> None:
    """train.init_from: to the same model, and to one with a memory."""
    model = models["gemma4"]
    save_model(model, tmp_path, EXTRA)
    card, weights = read_model_card(tmp_path), load_file(tmp_path / WEIGHTS)
    # As a bound that binds nothing, of which Gemma 4 has some.
    weights[NAMES["gemma4"][0]] = torch.tensor([torch.inf])
    same = build_model(model.config, model.vocabulary)
    take_weights(same, weights, card, "d", "there")
    larger = build_model(with_memory(model.config, MEMORY, 1), model.vocabulary)
    take_dense(larger, MEMORY, weights, card, "d", "there")
    for taken in (same, larger):
        assert {name: float(value) for name, value in kept_buffers(taken).items()} == pytest.approx(
            dict(zip(NAMES["gemma4"], (torch.inf, 1.3), strict=True))
        )
    del weights[NAMES["gemma4"][1]]
    with pytest.raises(DistlmError, match=r"layers.1.layer_scalar is missing there, \[1\] here"):
        take_weights(same, weights, card, "d", "there")


def test_exported_with_a_memory(models: dict[str, HfLM], tmp_path: Path) -> None:
    dense = models["gemma4"]
    model = HfLM(with_memory(dense.config, MEMORY, 1), dense.vocabulary).eval()
    set_buffers(model, kept_buffers(dense))
    found = exported(model, tmp_path / "hf")
    ids = torch.tensor([[5, 9, 17, 3], [8, 2, 2, 4]])
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model.hf(ids).logits, rtol=0, atol=1e-5)


def own_kinds() -> list[Description]:
    memory = placed(MEMORY, 2)
    sizes = TransformerConfig(layers=2, width=16, heads=2, ffn_width=24, cutoffs=[10, 20], max_positions=32)
    found: list[Description] = [
        sizes, TransformerModel(**asdict(sizes), memory=memory), LstmConfig(layers=2, width=16, hidden_width=24)
    ]  # fmt: skip
    bert = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    distilbert = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    for name, each in (("bert", bert), ("roberta", bert), ("distilbert", distilbert)):
        backbone = {"model_type": name, "max_position_embeddings": 40, "pad_token_id": 0, **each}
        found += [PlmModel(backbone, memory), TaskModelConfig(backbone, memory)]
    return found


@pytest.mark.parametrize("description", own_kinds(), ids=lambda one: one.KIND)
def test_our_own_kinds_have_none(description: Description) -> None:
    """What a memory has lies in its own files, and positions are computed: the bytes of these models are parameters'.

    What reads the weights of a masked language model takes parameters alone."""
    assert not kept_buffers(build_model(description, 60))
