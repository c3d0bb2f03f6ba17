"""Causal models with memory from tokens to neighbours: trained, started from a dense model, evaluated, stored,
searched, asked for text."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import write_text
from support.config import config_of
from support.foreign.hf import save_gpt2
from support.knn import in_stage
from support.train import curve, newest, settings

from distlm.config.load import load_config
from distlm.config.schema import RunConfig
from distlm.data.prepare import run_prepare
from distlm.datastore.reader import Datastore
from distlm.datastore.writer import plan_datastore, run_datastore_write
from distlm.errors import DistlmError, Stopped
from distlm.index import run_index_build
from distlm.knnlm.cache.stage import run_cache
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.generate.stage import run_generate
from distlm.knnlm.generate.words import Sampling
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.models.card import model_fingerprint
from distlm.models.io import load_model
from distlm.runtime.rundir import RunDir
from distlm.training.evaluate import run_evaluate as evaluate_alone
from distlm.training.finished import evaluated, lm_table
from distlm.training.loop import plan_train, run_train
from distlm.training.records import LmResults

SMALL = ["memory.sub_keys=8", "memory.heads=2", "memory.k=4", "memory.key_width=8", "train.valid_every=0",
         "train.save_every=0", "cache.windows=[50]", "cache.thetas=[0.1]"]  # fmt: skip
BEHIND = (
    ("datastore", run_datastore_write), ("index", run_index_build), ("knn", run_search), ("knn", run_cache),
    ("knn", run_tune), ("knn", run_evaluate),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With token files, and a dense run `dense`."""
    folder = tmp_path_factory.mktemp("memory-run")
    write_text(folder / "text")
    in_stage("prepare", config(folder, folder / "prepare"), run_prepare)
    in_stage("train", config(folder, folder / "dense"), run_train)
    return folder


def config(folder: Path, run: Path, *extra: str) -> RunConfig:
    text = f"data.text_dir={folder / 'text'}"
    return config_of("demo", [*settings(folder / "tokens", run, *SMALL, text), *extra])


def test_train_evaluate_store_search_generate(folder: Path, tmp_path: Path) -> None:
    asked = config(folder, tmp_path / "run", "memory.kind=pkm", "memory.positions=[1,2]", "memory.shared=true",
                   "memory.gated=true")  # fmt: skip
    run = RunDir(tmp_path / "run")
    plan = plan_train(asked, 1)
    assert any("2 memories of 64 slots that they share" in note for note in plan.notes)
    in_stage("train", asked, run_train)
    on_disk = sum(path.stat().st_size for path in newest(run.root).iterdir())
    # The headers of so small files are a part of them.
    assert 0.9 * on_disk < plan.disk_bytes / (asked.train.keep_last + 2) < 1.5 * on_disk
    for name in ("top1_mu", "stale"):
        assert 0 <= curve(run.root, f"memory/2/{name}")[12] <= 1
    assert curve(run.root, "memory/1/rows")[12] > 0
    assert curve(run.root, "memory/1/top1_mu") != curve(run.root, "memory/2/top1_mu")

    assert not evaluated(asked, run)
    in_stage("train", asked, evaluate_alone)
    results = LmResults.read(run.root / "lm.json")
    assert evaluated(asked, run) and "memory of layer 2: MU" in lm_table(results)
    assert results.model.memory_values == 64 * 32 and len(results.model.memory_files or {}) == 1
    staleness = results.staleness
    assert isinstance(staleness, dict) and sum(staleness["1"].slots) == 64

    for stage, function in BEHIND:
        in_stage(stage, asked, function)
    found = json.loads(run.results.read_text("utf-8"))["splits"]["valid"]
    assert found["lm"]["loss_nats"] == pytest.approx(results.splits["valid"].loss_nats, rel=1e-5)
    assert found["knn"]["loss_nats"] <= found["lm"]["loss_nats"]
    model = load_model(run.model_checkpoint(asked))[0]
    assert Datastore.open(run.datastore).model_fingerprint == model_fingerprint(run.model_checkpoint(asked))
    made = in_stage("knn", asked, lambda stage: run_generate(stage, "a b", Sampling(3, False, 1, 1.0, 2, 3), False))
    assert len(made.mixed) == 3
    assert plan_datastore(asked, 1).memory_bytes > 4 * 64 * 32 and len(model.memories) == 2  # type: ignore[arg-type]


def test_values_that_rotted_are_found(folder: Path, tmp_path: Path) -> None:
    asked = config(folder, tmp_path / "run", "memory.kind=resm", "train.updates=2")
    in_stage("train", asked, run_train)
    checkpoint = newest(tmp_path / "run")
    (file,) = checkpoint.glob("memory-*")
    before = model_fingerprint(checkpoint)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DistlmError, match=rf"{file.name}: damaged"):
        load_model(checkpoint)
    file.unlink()
    with pytest.raises(DistlmError, match=r"damaged \(missing"):
        load_model(checkpoint)
    assert model_fingerprint(checkpoint) == before


@pytest.mark.parametrize("kind", ["pkm", "resm", "fresh"])
def test_a_dense_run_gives_its_weights(folder: Path, tmp_path: Path, kind: str) -> None:
    """Kim & Jung's Init: all but the memory, and with pkm the networks that it replaces, is the dense model's."""
    extra = ["memory.kind=resm", "memory.fresh_ffn=true"] if kind == "fresh" else [f"memory.kind={kind}"]
    asked = config(folder, tmp_path / "run", *extra, "memory.values=zero", f"train.init_from={folder / 'dense'}",
                   "train.updates=1", "train.lr=0", "train.warmup_updates=0", "train.warmup_init_lr=0", "memory.lr=0",
                   "model.dropout=0", "model.attention_dropout=0", "model.softmax_dropout=0")  # fmt: skip
    in_stage("train", asked, run_train)
    dense, model = (load_model(newest(run))[0] for run in (folder / "dense", tmp_path / "run"))
    own, same = dict(model.named_parameters()), []
    for name, value in dense.named_parameters():
        if name in own:
            same.append(torch.equal(value, own[name]))
            assert same[-1] or (kind == "fresh" and name.startswith("layers.1.fc"))
        else:
            assert kind == "pkm" and name.startswith("layers.1.fc")
    assert same.count(False) == (4 if kind == "fresh" else 0)
    if kind == "resm":
        evaluations = [
            in_stage("train", each, evaluate_alone)["valid"] for each in (config(folder, folder / "dense"), asked)
        ]
        assert evaluations[0] == evaluations[1]


def test_a_run_with_memory_gives_it_too_and_cannot_lose_it(folder: Path, tmp_path: Path) -> None:
    first = config(folder, tmp_path / "first", "memory.kind=resm", "train.updates=3")
    in_stage("train", first, run_train)
    start = f"train.init_from={tmp_path / 'first'}"
    still = ["train.updates=1", "train.lr=0", "train.warmup_updates=0", "train.warmup_init_lr=0", "memory.lr=0"]
    in_stage("train", config(folder, tmp_path / "on", "memory.kind=resm", start, *still), run_train)
    one, other = (load_model(newest(tmp_path / name))[0] for name in ("first", "on"))
    values = [model.memories[2].table.values for model in (one, other)]  # type: ignore[index, union-attr]
    assert torch.equal(*values)
    with pytest.raises(DistlmError, match="has a memory, which would be lost"):
        in_stage("train", config(folder, tmp_path / "lost", start), run_train)
    with pytest.raises(DistlmError, match=r"memories of layers \[2\], and here of \[1\]"):
        in_stage(
            "train", config(folder, tmp_path / "other", "memory.kind=resm", "memory.positions=[1]", start), run_train
        )


def test_a_model_of_hugging_face(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", train_lines=240)
    model, run = save_gpt2(tmp_path / "gpt2", text), tmp_path / "run"
    tap = "transformer.h.1.mlp:input"
    asked = load_config("hf", [
        f"hf.name={model}", f"data.tokenizer={model}", f"data.text_dir={text}", f"run_dir={run}", "train.updates=4",
        "train.tokens_per_sample=64", "train.blocks_per_update=4", "train.micro_blocks=2", "train.log_every=1",
        "datastore.context_window=32", "datastore.block=32", "datastore.batch_blocks=4", "datastore.rows_per_shard=512",
        "index.factory=IVF16,PQ4", "index.sample=4096", "knn.context_window=32", "knn.block=32", "knn.batch_blocks=4",
        "knn.blocks_per_unit=8", "knn.k=16", "knn.nprobe=4", "knn.ks=[4,16]", "launch.threads=1", f"train.tap={tap}",
        f"datastore.tap={tap}", "memory.kind=resm", *SMALL,
    ])  # fmt: skip
    in_stage("prepare", asked, run_prepare)
    assert any("a memory of 64 slots" in note for note in plan_train(asked, 1).notes)
    summary: dict[str, Any] = in_stage("train", asked, run_train)
    assert math.isfinite(summary["valid_ppl"])
    for stage, function in BEHIND:
        in_stage(stage, asked, function)
    found = json.loads(RunDir(run).results.read_text("utf-8"))["splits"]["valid"]
    alone = in_stage("train", asked, evaluate_alone)
    assert alone["valid"] == pytest.approx(found["lm"]["perplexity"], rel=1e-4)
    # Stopped in the middle and started again: the same bytes.
    again = replace(asked, run_dir=str(tmp_path / "again"), data=replace(asked.data, tokens_dir=str(run / "tokens")))
    with pytest.raises(Stopped):
        in_stage("train", replace(again, train=replace(asked.train, max_updates_this_run=2)), run_train)
    in_stage("train", again, run_train)
    names = sorted(path.name for path in newest(run).iterdir() if path.suffix == ".safetensors")
    assert len(names) == 3
    for name in names:
        one, other = load_file(newest(run) / name), load_file(newest(tmp_path / "again") / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
