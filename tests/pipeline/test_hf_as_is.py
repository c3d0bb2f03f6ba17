"""A pretrained model as it is: one command from its folder to the table, text as written, and a token in front."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import UNSET
from support import distlm, write_text
from support.config import run_of
from support.disk import small_disk
from support.foreign.hf import save_gpt2, save_llama
from support.knn import in_stage

from distlm.config.load import load_config
from distlm.data.blocks import Blocks, eval_blocks, store_blocks
from distlm.data.dictionary import Dictionary
from distlm.data.prepare import run_prepare
from distlm.data.subwords import FIRST_PIECE, Subwords
from distlm.data.tokens import TokenFiles
from distlm.datastore.reader import Datastore
from distlm.datastore.writer import run_datastore_write
from distlm.errors import DistlmError, UsageError
from distlm.knnlm.generate.stage import run_generate
from distlm.knnlm.generate.words import Generator, Sampling
from distlm.knnlm.search.forward import open_forward
from distlm.models.card import model_fingerprint
from distlm.models.hf.config import HfRun
from distlm.models.hf.plan import plan_import
from distlm.models.io import load_model
from distlm.pipeline import check_settings
from distlm.runtime.rundir import RunDir
from distlm.training.evaluate import run_evaluate
from distlm.training.finished import trained
from distlm.training.loop import run_train

SETTINGS = [
    "train.updates=0", "train.tokens_per_sample=64", "datastore.batch_blocks=4", "datastore.rows_per_shard=512",
    "index.factory=IVF16,PQ4", "index.sample=4096", "knn.context_window=32", "knn.block=32", "knn.batch_blocks=4",
    "knn.blocks_per_unit=8", "knn.k=16", "knn.nprobe=4", "knn.ks=[4,16]", "launch.threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text/, gpt2/, and llama/, whose tokenizer puts <s> in front of a text."""
    folder = tmp_path_factory.mktemp("as_is")
    text = write_text(folder / "text", train_lines=160)
    save_gpt2(folder / "gpt2", text)
    save_llama(folder / "llama", text, begins=True)
    return folder


def words_of(folder: Path, name: str, run: Path, *extra: str) -> list[str]:
    return [f"hf.name={folder / name}", f"data.text_dir={folder / 'text'}", f"run_dir={run}", *SETTINGS, *extra]


def config_of(folder: Path, name: str, run: Path, *extra: str) -> HfRun:
    return run_of(HfRun, load_config("hf", words_of(folder, name, run, *extra)))


def test_one_command_from_the_models_folder_to_the_table(folder: Path, tmp_path: Path) -> None:
    words = words_of(folder, "gpt2", tmp_path / "run")
    shown = distlm("run", "hf", *words, "--dry-run").stdout
    assert re.search(r"^train +import of hf.name=\S+ as it is \(train.updates=0\), 0.0 M parameters, ", shown, re.M)
    assert "context 12 + block 84: 1.14 tokens computed per row" in shown
    done = distlm("run", "hf", *words)
    assert "imported hf.name=" in done.stdout and "perplexity per word" in done.stdout
    run = RunDir(tmp_path / "run")
    assert [path.name for path in run.complete_checkpoints()] == ["step-00000000"]
    store = Datastore.open(run.datastore)
    assert (store.manifest.context.context_window, store.manifest.context.block) == (12, 84)
    assert "begins" not in (run.datastore / "manifest.json").read_text("utf-8")
    # The weights are those of the folder.
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder / "gpt2")
    own = dict(load_model(run.checkpoint(0))[0].named_parameters())
    assert all(torch.equal(own[f"hf.{name}"], value) for name, value in hf.named_parameters())
    again = distlm("run", "hf", *words).stderr
    assert "complete; nothing to do" in again
    assert "train imported, datastore done" in distlm("status", str(tmp_path / "run")).stdout
    # The same run may be trained afterwards.
    config = config_of(folder, "gpt2", tmp_path / "run", "train.updates=2")
    RunDir.of(config).refuse_other_config(config, "train")
    assert not trained(config, run)
    generated = distlm("generate", str(tmp_path / "run"), "--prompt", "the w1 —", "--tokens", "8", "--greedy")
    assert "Ġ" not in generated.stdout and generated.stdout.startswith("prompt  the w1 —\n")


def test_a_killed_import_begins_anew_on_a_disk_that_just_fits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, "gpt2", tmp_path / "run")
    in_stage("prepare", config, run_prepare)
    checkpoints, needed = RunDir.of(config).checkpoints, plan_import(config).disk_bytes
    (checkpoints / ".step-00000000.tmp").mkdir(parents=True)
    (checkpoints / ".step-00000000.tmp" / "model.safetensors").write_bytes(bytes(needed))
    small_disk(monkeypatch, checkpoints, needed + needed // 20)
    in_stage("train", config, run_train)
    assert RunDir.of(config).complete_checkpoints()


def test_what_cannot_be_is_refused_before_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train.init_from='x': with train.updates=0 the model is hf.name as it is"):
        config_of(folder, "gpt2", tmp_path / "run", "train.init_from=x")
    with pytest.raises(UsageError, match=r"train.updates=0: must be at least 1"):
        load_config("wikitext2-small", ["train.updates=0", f"data.text_dir={folder / 'text'}"])
    with pytest.raises(UsageError, match=r"hf.name is empty"):
        config = load_config("hf", [f"data.text_dir={folder / 'text'}", "train.updates=0"])
        check_settings(config)
    with pytest.raises(UsageError, match=r"datastore.context_window=-2: must be at least -1"):
        config_of(folder, "gpt2", tmp_path / "run", "datastore.context_window=-2")


def by_hand(folder: Path, tokens: TokenFiles, split: str, blocks: Blocks, begin: bool) -> tuple[float, list[Any]]:
    """−Σ ln p over a split, and the inputs of the last norm at the scored places: transformers alone."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    facts = tokens.tokenizer
    assert facts is not None
    ids = np.asarray(tokens.split(split)).astype(np.int64)
    rows = np.where(ids == Dictionary.EOS, facts.line_end, ids - FIRST_PIECE)
    total, states = 0.0, []
    for first, start, end in zip(blocks.context_start, blocks.start, blocks.end, strict=True):
        before = 1 if begin else rows[first - 1] if first else facts.line_end
        given = torch.tensor([[int(before), *rows[first : end - 1].tolist()]])
        with torch.no_grad():
            output = hf(input_ids=given, output_hidden_states=True)
        scores = output.logits[0].double().log_softmax(1)[start - first :]
        total -= float(scores[torch.arange(end - start), rows[start:end]].sum())
        states += [*output.hidden_states[-1][0, start - first :]]
    return total, states


@pytest.mark.parametrize("begin", ["auto", "none"])
def test_the_token_in_front_is_context_and_no_row(folder: Path, tmp_path: Path, begin: str) -> None:
    config = config_of(folder, "llama", tmp_path / "run", f"hf.begin={begin}", "datastore.key_dtype=float32")
    run = RunDir.of(config)
    in_stage("prepare", config, run_prepare)
    tokens = TokenFiles.open(run.tokens(config))
    made: dict[str, Any] = in_stage("train", config, run_train)
    assert made["checkpoint"] == str(run.checkpoint(0))
    card = json.loads((run.checkpoint(0) / "model.json").read_text("utf-8"))
    assert card["config"].get("begin") == (1 if begin == "auto" else None)
    alone = in_stage("train", config, run_evaluate)
    ids, front = tokens.split("valid"), begin == "auto"
    nats, _ = by_hand(folder, tokens, "valid", eval_blocks(ids, 32, 32), front)
    assert alone["valid"] == pytest.approx(math.exp(nats / tokens.words("valid")), rel=1e-5)
    rule = json.loads((run.root / "lm.json").read_text("utf-8"))["context_rule"]
    assert ("after the beginning-of-text token" in rule) == front
    in_stage("datastore", config, run_datastore_write)
    store = Datastore.open(run.datastore)
    assert store.rows == len(tokens.split("train")) - 12
    assert store.manifest.context.begins is (True if front else UNSET)
    blocks = store_blocks(len(tokens.split("train")), 12, 84)
    first = Blocks(blocks.context_start[:3], blocks.start[:3], blocks.end[:3])
    _, states = by_hand(folder, tokens, "train", first, front)
    keys = store.keys(0)[: len(states)]
    np.testing.assert_allclose(keys, np.stack([state.numpy() for state in states]), atol=1e-4)
    assert np.array_equal(store.values(0)[:84], tokens.split("train")[12:96])


def test_a_model_of_before_goes_on_without_the_token(folder: Path, tmp_path: Path) -> None:
    """Checkpoints that name no such token keep their fingerprint, and training goes on as it began."""
    config = config_of(folder, "llama", tmp_path / "run", "hf.begin=none")
    in_stage("prepare", config, run_prepare)
    in_stage("train", config, run_train)
    checkpoint = RunDir.of(config).checkpoint(0)
    assert "begin" not in json.loads((checkpoint / "model.json").read_text("utf-8"))["config"]
    before = model_fingerprint(checkpoint)
    (tmp_path / "run" / "configs" / "train.yaml").unlink()
    on = ["train.updates=1", "train.valid_every=1", "train.warmup_updates=0"]
    longer = config_of(folder, "llama", tmp_path / "run", *on)
    in_stage("train", longer, run_train)
    assert "begin" not in json.loads(
        (RunDir.of(longer).checkpoint(1) / "model.json").read_text("utf-8")
    )["config"]  # fmt: skip
    assert model_fingerprint(checkpoint) == before


def test_a_piece_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    assert Subwords.load(str(folder / "llama")).begin == 1 and Subwords.load(str(folder / "gpt2")).begin is None
    config = config_of(folder, "llama", tmp_path / "run", "hf.begin=<bos>")
    in_stage("prepare", config, run_prepare)
    with pytest.raises(DistlmError, match=r"hf.begin=<bos>: the tokenizer of hf.name=.* has no such piece; set it to"):
        in_stage("train", config, run_train)


def facts_of(config: HfRun) -> Any:
    return TokenFiles.open(RunDir.of(config).tokens(config)).tokenizer


def first_word(model: Path, begin: list[int], facts: Any, prompt: str, token: int) -> float:
    """Probability of a token after a prompt, by transformers alone."""
    from transformers import AutoModelForCausalLM

    rows = [*begin, *Subwords.load(str(model)).tokenizer.encode(prompt, add_special_tokens=False).ids]
    with torch.no_grad():
        scores = AutoModelForCausalLM.from_pretrained(model).eval()(input_ids=torch.tensor([rows])).logits[0, -1]
    return float(scores.softmax(0)[facts.line_end if token == Dictionary.EOS else token - FIRST_PIECE])


@pytest.mark.parametrize(("name", "prompt"), [("gpt2", "the w1 w2"), ("llama", "")])
def test_kept_keys_and_values_give_the_same_words(folder: Path, tmp_path: Path, name: str, prompt: str) -> None:
    """Also beyond the longest text that the model is given, where the window moves."""
    config = config_of(folder, name, tmp_path / "run")
    in_stage("prepare", config, run_prepare)
    in_stage("train", config, run_train)
    sampling = Sampling(tokens=70, greedy=False, seed=3, top_p=1.0, shown=0, context=0)

    def generated(stage: Any) -> tuple[list[Any], list[Any], list[int]]:
        kept, anew = Generator(open_forward(stage)), Generator(open_forward(stage))
        lengths: list[int] = []
        model: Any = kept._forward.model
        model.hf.base_model.register_forward_pre_hook(
            lambda _module, _given, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
        )
        without: Any = anew._forward.model
        without.new_past = lambda: None
        ids = kept.shown.encode(prompt)
        made = kept.run(ids, sampling), anew.run(ids, sampling), lengths[:]
        # What was kept of a text is not used for another one.
        for text in ([9, 8, 7], [7, 8, 9, 9], [7, 8, 9, 9, 5, 6]):
            np.testing.assert_allclose(kept.next_word(text).p, anew.next_word(text).p, atol=1e-6)
        return made

    kept, anew, lengths = in_stage("knn", config, generated)
    assert [word.token for word in kept] == [word.token for word in anew]
    np.testing.assert_allclose([word.p for word in kept], [word.p for word in anew], rtol=1e-4)
    # A text begins as the blocks of the store do.
    begin = 1 if name == "llama" else facts_of(config).line_end
    assert kept[0].p == pytest.approx(
        first_word(folder / name, [begin], facts_of(config), prompt, kept[0].token), rel=1e-4
    )
    assert lengths[1:30] == [1] * 29 and lengths[-1] == 64
    made = in_stage("knn", config, lambda stage: run_generate(stage, prompt, sampling, True))
    assert [word.token for word in made.alone] == [word.token for word in kept]
