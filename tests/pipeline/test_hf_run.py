"""Models of Hugging Face from tokens to perplexity: trained, stored, indexed, searched, evaluated per word."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import write_text
from support.config import run_of
from support.foreign.hf import save_gpt2, save_llama
from support.knn import in_stage

from distlm.config.load import load_config
from distlm.data.blocks import eval_blocks
from distlm.data.prepare import plan_prepare, run_prepare
from distlm.data.tokens import TokenFiles
from distlm.datastore.writer import plan_datastore, run_datastore_write
from distlm.index import run_index_build
from distlm.index.choose.plan import plan_index
from distlm.knnlm.cache.plan import plan_cache
from distlm.knnlm.cache.stage import run_cache
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.evaluate.table import results_table
from distlm.knnlm.plan import plan_search
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.models.hf.config import HfRun
from distlm.models.hf.importer import import_hf
from distlm.models.io import load_model
from distlm.pipeline import steps_of
from distlm.runtime.rundir import RunDir
from distlm.training.evaluate import run_evaluate as evaluate_alone
from distlm.training.loop import plan_train, run_train

SETTINGS = [
    "train.tokens_per_sample=64", "train.blocks_per_update=4", "train.updates=6", "train.lr=0.003",
    "train.warmup_updates=1", "train.valid_every=3", "train.save_every=3", "train.log_every=1",
    "datastore.context_window=32", "datastore.block=32", "datastore.batch_blocks=4", "datastore.rows_per_shard=512",
    "index.factory=IVF16,PQ4", "index.sample=4096", "knn.context_window=32", "knn.block=32", "knn.batch_blocks=4",
    "knn.blocks_per_unit=8", "knn.k=16", "knn.nprobe=4", "knn.ks=[4,16]", "cache.windows=[50]", "cache.thetas=[0.1]",
    "launch.threads=1",
]  # fmt: skip
MODELS = {
    "gpt2": (save_gpt2, "transformer.h.1.mlp:input", "Ċ"),
    "llama": (save_llama, "model.layers.1.mlp:input", "</s>"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("hf") / "text", train_lines=240)


def config_of(name: str, folder: Path, text: Path, *extra: str) -> HfRun:
    model, tap = folder / name, MODELS[name][1]
    if not model.exists():
        MODELS[name][0](model, text)
    settings = [f"hf.name={model}", f"data.tokenizer={model}", f"data.text_dir={text}", f"run_dir={folder / 'run'}"]
    settings += [f"train.tap={tap}", f"datastore.tap={tap}"]
    return run_of(HfRun, load_config("hf", [*settings, *SETTINGS, *extra]))


def nats_by_hand(model: Path, weights: Any, tokens: TokenFiles) -> float:
    """−Σ ln p over the valid split: transformers alone, block by block, over the tokenizer's own ids."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer, hf = Tokenizer.from_file(str(model / "tokenizer.json")), AutoModelForCausalLM.from_pretrained(model)
    hf.load_state_dict({name.removeprefix("hf."): value for name, value in weights.items()}, strict=False)
    hf.eval()
    facts = tokens.tokenizer
    assert facts is not None
    end = facts.line_end
    rows: list[int] = []
    for line in (model.parent.parent / "text.txt").read_text("utf-8").split("\n")[:-1]:
        rows += [*tokenizer.encode(line, add_special_tokens=False).ids, end]
    blocks = eval_blocks(tokens.split("valid"), 32, 32)
    assert blocks.end[-1] == len(rows)
    total = 0.0
    for context, start, stop in zip(blocks.context_start, blocks.start, blocks.end, strict=True):
        given = [rows[context - 1] if context else end, *rows[context : stop - 1]]
        with torch.no_grad():
            logits = hf(input_ids=torch.tensor([given])).logits[0]
        scores = F.log_softmax(logits.double(), dim=1)[start - context :]
        total -= float(scores[torch.arange(stop - start), rows[start:stop]].sum())
    return total


@pytest.mark.parametrize("name", MODELS)
def test_train_store_index_evaluate(name: str, text: Path, tmp_path: Path) -> None:
    (tmp_path.parent / "text.txt").write_text((text / "valid.txt").read_text("utf-8"), "utf-8")
    config, run = config_of(name, tmp_path, text), RunDir(tmp_path / "run")
    assert [step.words for step in steps_of(config)][-1] == "knn evaluate"
    assert plan_prepare(config).disk_bytes > 0
    in_stage("prepare", config, run_prepare)
    tokens = TokenFiles.open(run.tokens(config))
    assert tokens.tokenizer is not None and tokens.tokenizer.line_end_piece == MODELS[name][2]
    plans = [plan(config, 1) for plan in (plan_train, plan_datastore, plan_index, plan_search, plan_cache)]
    assert all(plan.memory_bytes > 0 for plan in plans)
    summary: dict[str, Any] = in_stage("train", config, run_train)
    assert summary["step"] == 6 and math.isfinite(summary["valid_ppl"])
    for stage, function in (
        ("datastore", run_datastore_write), ("index", run_index_build), ("knn", run_search), ("knn", run_cache),
    ):  # fmt: skip
        in_stage(stage, config, function)
    tuned, evaluated = in_stage("knn", config, run_tune), in_stage("knn", config, run_evaluate)
    results = json.loads(run.results.read_text("utf-8"))
    valid = results["splits"]["valid"]
    words = sum(len(line.split()) + 1 for line in (text / "valid.txt").read_text("utf-8").split("\n")[:-1])
    assert valid["words"] == words < valid["tokens"] == len(tokens.split("valid"))
    weights = dict(load_model(run.model_checkpoint(config))[0].named_parameters())
    nats = nats_by_hand(tmp_path / name, weights, tokens)
    assert valid["lm"]["loss_nats"] * valid["tokens"] == pytest.approx(nats, rel=1e-5)
    assert valid["lm"]["perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert valid["lm"]["token_perplexity"] == pytest.approx(math.exp(nats / valid["tokens"]), rel=1e-4)
    assert valid["knn"]["loss_nats"] <= valid["lm"]["loss_nats"]
    # The two stages print the same figures under the same names.
    for prefix, name in (("lm_", "lm"), ("", "knn"), ("cache_", "cache")):
        found = tuned[f"{prefix}perplexity_per_word"], tuned[f"{prefix}perplexity_per_token"]
        assert found == pytest.approx((valid[name]["perplexity"], valid[name]["token_perplexity"]), rel=1e-6)
        assert evaluated[f"valid/{name}/perplexity_per_word"] == valid[name]["perplexity"]
    assert not any(name.endswith("perplexity") for name in {**tuned, **evaluated})
    alone = in_stage("train", config, evaluate_alone)
    assert alone["valid"] == pytest.approx(valid["lm"]["perplexity"], rel=1e-4)
    table = results_table(Results.read(run.results))
    assert "perplexity per word" in table and "LM, per token" in table


def test_a_model_as_it_is_and_then_tuned(text: Path, tmp_path: Path) -> None:
    config = config_of("gpt2", tmp_path, text, "train.updates=2")
    in_stage("prepare", config, run_prepare)
    found: dict[str, Any] = import_hf(config)
    tokens = TokenFiles.open(tmp_path / "run" / "tokens")
    # A fresh model knows nothing: every token costs about ln V nats.
    assert found["valid_loss"] == pytest.approx(math.log(300), rel=0.02)
    per_word = found["valid_loss"] * len(tokens.split("valid")) / tokens.words("valid")
    assert found["valid_ppl"] == pytest.approx(math.exp(per_word))
    before = load_model(Path(found["checkpoint"]))[0].state_dict()
    summary: dict[str, Any] = in_stage("train", config, run_train)
    assert summary["step"] == 2 and summary["valid_loss"] < found["valid_loss"]
    after = load_model(tmp_path / "run" / "checkpoints" / "step-00000002")[0].state_dict()
    assert any(not np.array_equal(before[name], after[name]) for name in before)
