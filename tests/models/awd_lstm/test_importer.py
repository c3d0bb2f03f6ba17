"""Importing state dicts of salesforce/awd-lstm-lm and fastai: the same model over the dictionary's ids, or refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY, distlm, write_text
from support.lstm import lstm_config, lstm_settings
from torch import Tensor, nn

from distlm.config import load_config
from distlm.data.corpus import open_corpus
from distlm.data.prepare import run_prepare
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.awd_lstm.config import LstmRun
from distlm.models.awd_lstm.exchange.importer import import_awd_lstm
from distlm.models.awd_lstm.exchange.state_dict import first_seen
from distlm.models.io import load_model
from distlm.runtime.stage import open_stage
from distlm.training.loop import run_train


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text, and its token files, unpadded, in `tokens`."""
    folder = tmp_path_factory.mktemp("import")
    write_text(folder / "text")
    with (folder / "text" / "train.txt").open("a") as train:
        train.write("w1 <unk> w2\n")
    settings = [f"data.text_dir={folder / 'text'}", f"data.tokens_dir={folder / 'tokens'}", "data.source=folder"]
    settings += ["data.max_words=0", "data.pad_to_multiple=1", f"run_dir={folder / 'prepare'}"]
    with open_stage("prepare", load_config("demo", [*TINY, *settings])) as stage:
        run_prepare(stage)
    return folder


def config_of(text: Path, run: Path, *overrides: str) -> LstmRun:
    return lstm_config(text / "tokens", run, *data(text), *overrides)


def data(text: Path) -> list[str]:
    return [f"data.text_dir={text / 'text'}", "data.max_words=0", "data.pad_to_multiple=1"]


def vocabulary(text: Path) -> list[str]:
    """Written out anew: words as they come, <eos> at each line's end."""
    words: list[str] = []
    for split in ("train", "valid", "test"):
        for line in (text / "text" / f"{split}.txt").read_text("utf-8").split("\n")[:-1]:
            words += [*line.split(), "<eos>"]
    return sorted(set(words), key=words.index)


def foreign(words: int) -> dict[str, Tensor]:
    """A model under salesforce's names: 12 → 16 → 12."""
    torch.manual_seed(4)
    tensors = {"encoder.weight": torch.randn(words, 12) * 0.1, "decoder.bias": torch.randn(words) * 0.1}
    tensors["decoder.weight"] = tensors["encoder.weight"]
    for number, lstm in enumerate((nn.LSTM(12, 16), nn.LSTM(16, 12))):
        for name, value in lstm.state_dict().items():
            suffix = "_raw" if name == "weight_hh_l0" else ""
            tensors[f"rnns.{number}.module.{name}{suffix}"] = value
    return tensors


def as_fastai(tensors: dict[str, Tensor]) -> dict[str, Any]:
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith("_raw"):
            named[f"0.{name.replace('module.', '')}"] = value
            named[f"0.{name.removesuffix('_raw')}"] = value * 0  # the last dropped one lies beside it
        else:
            named[("1." if name.startswith("decoder") else "0.") + name] = value
    named["0.encoder_dp.emb.weight"] = tensors["encoder.weight"]
    return {"model": named, "opt": None}


def loss_by_hand(tensors: dict[str, Tensor], words: list[str], lines: list[str]) -> float:
    """Mean loss over a text in one go, computed with torch's LSTM under the foreign ids."""
    ids = torch.tensor([words.index(word) for line in lines for word in [*line.split(), "<eos>"]])
    hidden = tensors["encoder.weight"][ids[:-1]][:, None]
    for number, (before, after) in enumerate(((12, 16), (16, 12))):
        lstm = nn.LSTM(before, after)
        prefix = f"rnns.{number}.module."
        state = {
            name.removeprefix(prefix).removesuffix("_raw"): v for name, v in tensors.items() if name.startswith(prefix)
        }
        lstm.load_state_dict(state)
        with torch.no_grad():
            hidden = lstm(hidden)[0]
    scores = hidden[:, 0] @ tensors["encoder.weight"].t() + tensors["decoder.bias"]
    return float(nn.functional.cross_entropy(scores.double(), ids[1:]))


@pytest.mark.parametrize("names", ["salesforce", "fastai", "safetensors"])
def test_an_imported_model_computes_what_it_did(text: Path, tmp_path: Path, names: str) -> None:
    words = vocabulary(text)
    assert first_seen(open_corpus(config_of(text, tmp_path).data).read("train")) == words
    tensors = foreign(len(words))
    path = tmp_path / "state.pt"
    if names == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "state.safetensors"
        save_file({name: value.clone() for name, value in tensors.items()}, path)
    else:
        torch.save(as_fastai(tensors) if names == "fastai" else tensors, path)
    lines = (text / "text" / "valid.txt").read_text("utf-8").split("\n")[:-1]
    expected = loss_by_hand(tensors, words, lines)
    summary: dict[str, Any] = import_awd_lstm(config_of(text, tmp_path / "run", "awd.valid_batch=1"), path, None)
    assert summary["valid_loss"] == pytest.approx(expected, rel=1e-5)
    model: Any = load_model(Path(summary["checkpoint"]))[0]
    dictionary = TokenFiles.open(text / "tokens").dictionary
    for word in words[:5]:
        row = dictionary.encode("</s>" if word == "<eos>" else word) - 2
        assert torch.equal(model.embedding[row], tensors["encoder.weight"][words.index(word)])


def test_training_goes_on_from_an_import(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save(foreign(len(vocabulary(text))), path)
    small = ["awd.epochs=1", "awd.finetune_epochs=0", "awd.batch=40"]
    listed = tmp_path / "words.txt"
    listed.write_text("\n".join(vocabulary(text)), "utf-8")
    command = ["--weights", str(path), "--vocabulary", str(listed), *data(text)]
    done = distlm(
        "import", "awd-lstm", "awd-lstm-small", *lstm_settings(text / "tokens", tmp_path / "run", *small), *command
    )
    assert "valid_ppl=" in done.stdout
    config = config_of(text, tmp_path / "run", *small)
    with open_stage("train", config) as stage:
        summary: dict[str, Any] = run_train(stage)
    assert summary["step"] > 5 and summary["train_loss"] < 4.5
    with pytest.raises(DistlmError, match="there are checkpoints already"):
        import_awd_lstm(config, path, None)


class Pickled:
    """Stands for a whole model."""


def refusals(text: Path) -> list[tuple[Any, str]]:
    words = len(vocabulary(text))
    good = foreign(words)
    untied = {**good, "decoder.weight": good["decoder.weight"] + 1}
    encoder = {name: value for name, value in good.items() if not name.startswith("decoder")}
    return [
        ([Pickled()], "pickled Python classes .*torch.save.model.state_dict"),
        (foreign(words - 1), f"vocabulary mismatch: the embedding has {words - 1} rows"),
        (untied, "decoder.weight differs from the embedding; only tied"),
        (encoder, "decoder_bias missing; an encoder without its decoder"),
        ({**good, "rnns.0.module.linear.weight": torch.zeros(1)}, "rnns.0.module.linear.weight is no part .*QRNN"),
        ({**good, "rnns.0.layers.0.linear.weight": torch.zeros(1)}, "rnns.0.layers.0.linear.weight .*QRNN, which"),
        # A model of WikiText-103 is one of another vocabulary first of all.
        (
            {**foreign(words + 40), "rnns.0.layers.0.linear.weight": torch.zeros(1)},
            f"vocabulary mismatch: the embedding has {words + 40} rows, the dictionary .* {words} words",
        ),
        ({**good, "criterion.tail": torch.zeros(1)}, "criterion.tail is no part .*: the model is another"),
        (
            {**good, "decoder.bias": good["decoder.bias"].clone().index_fill_(0, torch.tensor([3]), math.nan)},
            rf"state.pt: 1 of {words} numbers of decoder_bias are NaN or infinite",
        ),
        (torch.zeros(3), "not a state dict .* but Tensor"),
    ]


def test_what_is_not_such_a_model_is_refused(text: Path, tmp_path: Path) -> None:
    path, config = tmp_path / "state.pt", config_of(text, tmp_path / "run")
    for content, said in refusals(text):
        torch.save(content, path)
        with pytest.raises(DistlmError, match=said):
            import_awd_lstm(config, path, None)
    for held, said in ((b"text\n", "is text"), (b"", "is empty"), (bytes(99), "is no file of tensors")):
        path.write_bytes(held)
        with pytest.raises(DistlmError, match=rf"state\.pt: {said}; --weights takes what torch.save or safetensors"):
            import_awd_lstm(config, path, None)
    with pytest.raises(DistlmError, match=r"is a folder; name the file in it"):
        import_awd_lstm(config, tmp_path, None)
    torch.save(foreign(len(vocabulary(text))), path)
    with pytest.raises(DistlmError, match=r"import it with lstm.width=12 lstm.hidden_width=16"):
        import_awd_lstm(config_of(text, tmp_path / "run", "lstm.width=20", "lstm.hidden_width=30"), path, None)
    other = tmp_path / "words.txt"
    other.write_text("\n".join([*vocabulary(text)[:-1], "elsewhere"]), "utf-8")
    with pytest.raises(DistlmError, match=r"vocabulary mismatch: 1 words of the dictionary are not in .*words.txt"):
        import_awd_lstm(config, path, other)
    assert not list((tmp_path / "run").rglob("step-*")), "nothing half-written"
