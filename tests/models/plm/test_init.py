"""What a pretraining may start from: Hugging Face checkpoints that are whole and have the vocabulary of the shards."""

import dataclasses
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.finetune import hugging_face, pretrained, vocabulary

from distlm.data.shards.wordpiece import WordPiece
from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.models.plm.config import PlmConfig
from distlm.models.plm.export import save_pretrained
from distlm.models.plm.init import start_from
from distlm.models.plm.io import load_plm
from distlm.models.plm.model import Plm, plm_model

FAMILIES = ("bert", "roberta", "distilbert")


@pytest.fixture
def shards(tmp_path: Path) -> WordPiece:
    return vocabulary(tmp_path / "tokenizer")


def start(folder: Path, wordpiece: WordPiece) -> Plm:
    """A model that pretraining would start with on shards of that vocabulary."""
    plm, memory = PlmConfig(checkpoint=str(folder)), MemoryConfig()
    model = Plm(plm_model(plm, memory, 1), len(wordpiece.pieces))
    start_from(model, plm, memory, wordpiece.hash)
    return model


def drop(folder: Path, part: str) -> None:
    """Take weights out of the checkpoint."""
    path = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if part not in name}, path, {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_without_a_head_is_taken(tmp_path: Path, shards: WordPiece, family: str) -> None:
    folder = hugging_face(tmp_path / "hf", family)
    encoder = transformers.AutoModel.from_pretrained(folder)
    own = dict(start(folder, shards).hf.base_model.named_parameters())
    assert own and all(torch.equal(value, encoder.get_parameter(name)) for name, value in own.items())


def test_a_masked_language_model_is_taken_whole(tmp_path: Path, shards: WordPiece) -> None:
    folder = tmp_path / "hf"
    save_pretrained(load_plm(pretrained(tmp_path / "run", "none") / "checkpoints" / "step-00000007")[0], folder)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    own = dict(start(folder, shards).hf.named_parameters())
    assert all(torch.equal(value, theirs.get_parameter(name)) for name, value in own.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_that_lacks_a_layer_is_refused(tmp_path: Path, shards: WordPiece, family: str) -> None:
    folder = hugging_face(tmp_path / "hf", family)
    drop(folder, "layer.1.")
    with pytest.raises(DistlmError, match=rf"hf: {family}\.\S+\.layer\.1\.\S+ is missing there .*get it again"):
        start(folder, shards)


def test_weights_of_another_shape_are_refused(tmp_path: Path, shards: WordPiece) -> None:
    folder = hugging_face(tmp_path / "hf")
    path, name = folder / "model.safetensors", "encoder.layer.0.output.dense.bias"
    save_file({**load_file(path), name: torch.zeros(7)}, path, {"format": "pt"})
    with pytest.raises(DistlmError, match=rf"hf: bert\.{name} is of another shape there"):
        start(folder, shards)


def test_cut_weights_are_refused(tmp_path: Path, shards: WordPiece) -> None:
    folder = hugging_face(tmp_path / "hf")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DistlmError, match=r"plm\.checkpoint=\S+hf: model\.safetensors is cut or damaged \(.*again"):
        start(folder, shards)


@pytest.mark.parametrize("kind", ["pkm", "resm"])
def test_a_folder_with_a_memory_is_refused(tmp_path: Path, shards: WordPiece, kind: str) -> None:
    source = pretrained(tmp_path / "run", kind)
    save_pretrained(load_plm(source / "checkpoints" / "step-00000007")[0], tmp_path / "hf")
    with pytest.raises(DistlmError, match=r"plm\.checkpoint=\S+hf: has a memory, which would be lost; continue"):
        start(tmp_path / "hf", shards)


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_a_vocabulary_of_the_same_size_in_another_order_is_refused(
    tmp_path: Path, shards: WordPiece, file: str
) -> None:
    folder = hugging_face(tmp_path / "hf")
    (folder / {"vocab.txt": "tokenizer.json", "tokenizer.json": "vocab.txt"}[file]).unlink()
    start(folder, shards)
    # How the text of the shards was made ready is no part of the map.
    start(folder, dataclasses.replace(shards, lower_case=False))
    swapped = list(shards.pieces)
    swapped[10], swapped[11] = swapped[11], swapped[10]
    there = rf"\S+{file}" if file == "vocab.txt" else rf"a vocab\.txt of the pieces in \S+{file}"
    message = rf"hf: another vocabulary \({len(swapped)} pieces, \S+{file}\) than .*shards\.vocabulary={there}"
    with pytest.raises(DistlmError, match=message):
        start(folder, WordPiece(tuple(swapped), True))
    with pytest.raises(DistlmError, match=message):
        start(folder, WordPiece((*shards.pieces, "more"), True))


def test_a_bpe_vocabulary_cannot_be_that_of_shards(tmp_path: Path, shards: WordPiece) -> None:
    folder = hugging_face(tmp_path / "hf", "roberta")
    (folder / "vocab.txt").unlink()
    ids = {piece: number for number, piece in enumerate(shards.pieces)}
    tokenizers.Tokenizer(tokenizers.models.BPE(ids, [])).save(str(folder / "tokenizer.json"))
    with pytest.raises(DistlmError, match=r"hf: a BPE vocabulary \(\S+tokenizer\.json\), and shards are WordPiece"):
        start(folder, shards)
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(DistlmError, match=r"hf: a BPE vocabulary \(\S+vocab\.json\), and shards are WordPiece"):
        start(folder, shards)


def test_a_checkpoint_without_a_tokenizer_is_taken_with_a_word(
    tmp_path: Path, shards: WordPiece, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hugging_face(tmp_path / "hf")
    for path in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / path).unlink()
    start(folder, shards)
    assert capsys.readouterr().err.count("hf: no vocab.txt or tokenizer.json there: that its") == 1
    with pytest.raises(DistlmError, match=rf"hf: a vocabulary of {len(shards.pieces)}, and the shards have"):
        start(folder, WordPiece((*shards.pieces, "more"), True))


def test_embeddings_beyond_the_vocabulary_are_refused_with_a_mend_that_works(tmp_path: Path, shards: WordPiece) -> None:
    folder, size = hugging_face(tmp_path / "hf"), len(shards.pieces)
    model = transformers.AutoModel.from_pretrained(folder)
    model.resize_token_embeddings(size + 5)
    model.save_pretrained(folder)
    with pytest.raises(DistlmError, match=rf"{size + 5} embeddings for the {size} pieces .*resize_token_embeddings"):
        start(folder, shards)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(size)
    model.save_pretrained(folder)
    start(folder, shards)
