"""Model folders: what is saved is what is loaded, and what is damaged or foreign is refused."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.records import unsealed

from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.models.card import model_fingerprint
from distlm.models.io import check_dictionary, load_model, save_model, save_weights
from distlm.models.records import ModelCard
from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import TransformerLM
from distlm.runtime.ranks.device import default_device
from distlm.runtime.records import replaced

CONFIG = TransformerConfig(layers=2, width=16, heads=2, ffn_width=24, cutoffs=[10, 20], factor=2, max_positions=32)
EXTRA = {"dictionary": "abc", "step": 7}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[TransformerLM, Path]:
    torch.manual_seed(0)
    model = TransformerLM(CONFIG, 40)
    save_model(model, tmp_path / "model", EXTRA)
    return model, tmp_path / "model"


def test_round_trip(saved: tuple[TransformerLM, Path]) -> None:
    model, folder = saved
    loaded, card = load_model(folder, torch.device("cpu"))
    assert not loaded.training
    assert (card.step, card.vocabulary, loaded.config) == (7, 40, CONFIG)
    inputs = torch.randint(2, 40, (2, 9))
    assert torch.equal(loaded(inputs).hidden, model.eval()(inputs).hidden)
    assert isinstance(loaded, TransformerLM)
    assert loaded.softmax.embedding_1 is loaded.embedding.embedding_1
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]


def test_weights_gathered_as_slices_of_a_flat_half_buffer(tmp_path: Path, saved: tuple[TransformerLM, Path]) -> None:
    model, folder = saved
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).half()
    parts = flat.split([shape.numel() for shape in shapes.values()])
    weights = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    save_weights(weights, CONFIG, 40, tmp_path / "gathered", EXTRA)
    loaded, _ = load_model(tmp_path / "gathered")
    for mine, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.half().float())
    assert model_fingerprint(tmp_path / "gathered") != model_fingerprint(folder)


def test_equal_models_give_equal_bytes_and_fingerprints(tmp_path: Path, saved: tuple[TransformerLM, Path]) -> None:
    model, folder = saved
    shuffled = dict(reversed(list(model.named_parameters())))
    save_weights(shuffled, CONFIG, 40, tmp_path / "again", {**EXTRA, "step": 8})
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert model_fingerprint(tmp_path / "again") == model_fingerprint(folder)


def test_one_flipped_bit_is_refused(saved: tuple[TransformerLM, Path]) -> None:
    path = saved[1] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DistlmError, match=r"model\.safetensors: checksum .* damaged"):
        load_model(saved[1])


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_missing_file_is_named(saved: tuple[TransformerLM, Path], name: str) -> None:
    (saved[1] / name).unlink()
    with pytest.raises(DistlmError, match=name.replace(".", r"\.")):
        load_model(saved[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "gru"}, r"model\.json: kind 'gru' is unknown"),
        ({"vocabulary": 41}, r"embedding\.embedding_2 has shape \[20, 4\], expected \[21, 4\]"),
        ({"config": {"width": 16, "colour": "red"}}, "colour"),
        ({"dictionary": None}, "dictionary missing"),
    ],
)
def test_a_foreign_description_is_refused(saved: tuple[TransformerLM, Path], change: dict, message: str) -> None:
    path = saved[1] / "model.json"
    card = {**unsealed(path), **change}
    path.write_text(json.dumps({key: value for key, value in card.items() if value is not None}))
    with pytest.raises(DistlmError, match=message):
        load_model(saved[1])


def test_a_cut_description_is_refused(saved: tuple[TransformerLM, Path]) -> None:
    path = saved[1] / "model.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(DistlmError, match=r"model\.json: not valid JSON"):
        load_model(saved[1])


def test_weights_that_do_not_fit_are_not_written(tmp_path: Path, saved: tuple[TransformerLM, Path]) -> None:
    weights: dict[str, torch.Tensor] = dict(saved[0].named_parameters())
    weights["layers.0.fc1.weight"] = weights["layers.0.fc1.weight"][:-1]
    with pytest.raises(ValueError, match=r"layers\.0\.fc1\.weight has shape \[23, 16\]"):
        save_weights(weights, CONFIG, 40, tmp_path / "bad", EXTRA)
    del weights["layers.0.fc1.weight"]
    with pytest.raises(ValueError, match="is missing"):
        save_weights(weights, CONFIG, 40, tmp_path / "bad", EXTRA)
    with pytest.raises(ValueError, match="dictionary"):
        save_model(saved[0], tmp_path / "bad", {"step": 1})
    with pytest.raises(ValueError, match="weights"):
        save_model(saved[0], tmp_path / "bad", {**EXTRA, "weights": "0"})
    assert not (tmp_path / "bad").exists()


def test_only_the_names_of_parameters_are_on_disk(saved: tuple[TransformerLM, Path]) -> None:
    names = safetensors.torch.load_file(saved[1] / "model.safetensors").keys()
    assert names == dict(saved[0].named_parameters()).keys()


def test_another_dictionary_is_refused() -> None:
    dictionary = Dictionary([f"w{i}" for i in range(36)], [1] * 36)
    card = ModelCard(kind="transformer_lm", config={}, vocabulary=40, dictionary=dictionary.hash, weights="")
    check_dictionary(card, dictionary)
    swapped = Dictionary(["w1", "w0", *(f"w{i}" for i in range(2, 36))], [1] * 36)
    with pytest.raises(DistlmError, match="wrong dictionary for a model"):
        check_dictionary(card, swapped)
    with pytest.raises(DistlmError, match="48 words"):
        check_dictionary(replaced(card, vocabulary=48), dictionary)


def test_default_device_is_one_that_works() -> None:
    assert torch.zeros(2, device=default_device()).sum().item() == 0
