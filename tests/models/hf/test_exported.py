"""What `distlm export hf` wrote of a Hugging Face model, and the same folder as hf.name of another run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import distlm, shared, write_text
from support.config import run_of
from support.foreign.hf import save_gpt2
from support.hf.runs import MEMORY, SETTINGS, Made, made_run
from support.knn import in_stage

import distlm as package
from distlm.config.load import load_config
from distlm.config.schema import RunConfig
from distlm.data.prepare import run_prepare
from distlm.data.subwords import FIRST_PIECE
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.hf.config import HfRun
from distlm.models.hf.importer import import_hf
from distlm.models.hf.model import hf_model
from distlm.models.io import load_model
from distlm.pipeline import check_settings
from distlm.runtime.rundir import RunDir
from distlm.training.loop import run_train

Loaded = tuple[Any, Any]
AUTO = transformers.AutoModelForCausalLM


def export(run: Path, out: Path) -> Loaded:
    """The model and the tokenizer of the folder."""
    distlm("export", "hf", str(run), "--out", str(out))
    found = (of.from_pretrained(out, trust_remote_code=True) for of in (AUTO, transformers.AutoTokenizer))
    model, tokenizer = found
    return model.eval(), tokenizer


def config_of(made: Made, folder: Path, *settings: str) -> HfRun:
    given = [f"data.text_dir={made.text}", f"run_dir={folder}", "train.tap=output", "datastore.tap=output"]
    return run_of(HfRun, load_config("hf", [*SETTINGS, *given, *settings]))


def _loaded(config: HfRun) -> Any:
    """The model of a run's best checkpoint."""
    return load_model(RunDir.of(config).model_checkpoint(config))[0]


def test_a_text_begins_as_in_the_run(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """The tokenizer of the folder cuts as the token files, with <bos> in front; the folder is a model as any other."""
    made = made_run(tmp_path_factory, "gemma2")
    model, tokenizer = export(made.run.root, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert "A text begins with the piece `<bos>`, which the tokenizer puts in front." in card
    line = made.split("valid").split("\n")[0]
    given = tokenizer(line, return_tensors="pt")["input_ids"]
    ids = np.asarray(TokenFiles.open(made.run.tokens(made.config)).split("valid"))[: given.shape[1] - 1]
    assert given[0].tolist() == [1, *(ids - FIRST_PIECE).tolist()]
    with torch.inference_mode():
        scores = model(given).logits[0, :-1].double().log_softmax(1)
    own = package.open_run(made.run.root).log_probs(made.split("valid"), knn=False).lm[: len(ids)]
    assert np.abs(scores[torch.arange(len(ids)), given[0, 1:]].numpy() - own).max() < 1e-5
    again = config_of(made, tmp_path / "again", f"hf.name={tmp_path / 'hf'}", "train.updates=0")
    check_settings(again)
    in_stage("prepare", again, run_prepare)
    import_hf(again)
    first, second = _loaded(made.config), _loaded(again)
    there = dict(second.named_parameters())
    assert second.begins and all(torch.equal(there[name], value) for name, value in first.named_parameters())


@pytest.mark.parametrize(("begin", "front", "said"), [
    ("<|endoftext|>", [0], "A text begins with the piece `<|endoftext|>`"), ("none", [], "`Ċ`."),
])  # fmt: skip
def test_a_token_in_front_that_the_tokenizer_does_not_put(
    tmp_path: Path, begin: str, front: list[int], said: str
) -> None:
    text = write_text(tmp_path / "text", train_lines=80)
    made = Made(save_gpt2(tmp_path / "gpt2", text), text, HfRun())
    config = config_of(made, tmp_path / "run", f"hf.name={made.folder}", f"hf.begin={begin}", "train.updates=0")
    in_stage("prepare", config, run_prepare)
    import_hf(config)
    _, tokenizer = export(tmp_path / "run", tmp_path / "hf")
    bare = tokenizer("w1 w2", add_special_tokens=False).input_ids
    assert tokenizer("w1 w2").input_ids == [*front, *bare]
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert said in card and ("text begins" in card) == bool(front)


def test_a_memory_is_not_read_from_there(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Which is said before work, and what is said to do instead works; a KnnLM reads the folder with its memory."""
    made, out = made_run(tmp_path_factory, "gemma2", memory=True), tmp_path / "hf"
    model, tokenizer = export(made.run.root, out)
    knn = package.KnnLM(model, tokenizer)
    own = package.open_run(made.run.root).log_probs(made.split("valid"), knn=False).lm
    assert knn.tap == made.config.datastore.tap
    assert np.abs(knn.log_probs(made.split("valid"), context_window=32, block=32).lm - own).max() < 1e-5
    config = config_of(made, tmp_path / "next", f"hf.name={out}", "train.updates=1")
    with pytest.raises(DistlmError, match=r"hf: a gemma2 exported with its product-key memory, .*train.init_from=RUN"):
        check_settings(config)
    config = config_of(made, tmp_path / "next", f"hf.name={made.folder}", f"train.init_from={made.run.root}", *MEMORY,
                       "memory.frozen=true")  # fmt: skip
    in_stage("prepare", config, run_prepare)
    in_stage("train", config, run_train)
    before, after = (_loaded(one) for one in (made.config, config))
    assert torch.equal(before.memories[1].table.values, after.memories[1].table.values)


def test_words_are_refused(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    words: RunConfig = shared.searched(tmp_path_factory)
    distlm("export", "hf", words.run_dir, "--out", str(tmp_path / "hf"))
    with pytest.raises(DistlmError, match=r"hf: an exported transformer_lm, which is a model over words, .*: model.kind"
                       r"=transformer_lm train.init_from=RUN"):  # fmt: skip
        hf_model(str(tmp_path / "hf"))
    path = tmp_path / "hf" / "config.json"
    tree = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**tree, "model_type": "distlm_bert", "auto_map": {"AutoModelForMaskedLM": "x.Y"}}))
    with pytest.raises(DistlmError, match=r"hf: an exported bert, no causal language model"):
        hf_model(str(tmp_path / "hf"))
