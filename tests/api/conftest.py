"""Finished runs of the three kinds that predict the next word, tuned and evaluated; read only."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import shared, write_text
from support.config import run_of
from support.foreign.hf import save_gpt2
from support.knn import in_stage
from support.store import tiny_config

from distlm.config.load import load_config
from distlm.config.schema import RunConfig
from distlm.data.prepare import run_prepare
from distlm.data.tokens import TokenFiles
from distlm.datastore.writer import run_datastore_write
from distlm.index import run_index_build
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.models.awd_lstm.config import LstmConfig
from distlm.models.described import build_model
from distlm.models.hf.config import HfRun
from distlm.models.hf.importer import import_hf
from distlm.models.io import save_model
from distlm.runtime.files import write_json
from distlm.runtime.rundir import RunDir

LSTM = [
    "model.kind=awd_lstm", "train.optimizer=nt_asgd", "lstm.width=16", "lstm.hidden_width=24", "lstm.layers=2",
    "datastore.tap=last_output", "datastore.key_dtype=float32",
]  # fmt: skip
HF = [
    "train.tap=transformer.h.1.mlp:input", "datastore.tap=transformer.h.1.mlp:input", "datastore.context_window=32",
    "datastore.block=32", "datastore.batch_blocks=4", "datastore.rows_per_shard=512", "index.factory=IVF16,PQ4",
    "index.sample=4096", "knn.context_window=32", "knn.block=32", "knn.batch_blocks=4", "knn.blocks_per_unit=8",
    "knn.k=16", "knn.nprobe=4", "knn.ks=[4,16]", "knn.distances=quantised", "train.tokens_per_sample=64",
    "launch.threads=1",
]  # fmt: skip


@pytest.fixture(scope="session")
def transformer_lm(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return shared.searched(tmp_path_factory)


@pytest.fixture(scope="session")
def awd_lstm(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Random weights."""

    def config(folder: Path) -> RunConfig:
        return tiny_config(folder / "run", folder / "text", LSTM)

    def make(folder: Path) -> None:
        write_text(folder / "text")
        own = config(folder)
        in_stage("prepare", own, run_prepare)
        run = RunDir.of(own)
        dictionary = TokenFiles.open(run.tokens(own)).dictionary
        torch.manual_seed(0)
        checkpoint = run.checkpoint(1)
        model = build_model(own.section(LstmConfig), len(dictionary))
        save_model(model, checkpoint, {"dictionary": dictionary.hash, "step": 1})
        write_json(checkpoint / "complete.json", {"step": 1})
        write_json(run.checkpoints / "best.json", {"checkpoint": checkpoint.name, "valid_loss": 1.0})
        _finish(own)

    return config(shared.made_once(tmp_path_factory, "awd-lstm", make))


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A GPT-2 as it was made, with its own tokenizer."""

    def config(folder: Path) -> HfRun:
        named = [f"hf.name={folder / 'gpt2'}", f"data.tokenizer={folder / 'gpt2'}", f"data.text_dir={folder / 'text'}"]
        return run_of(HfRun, load_config("hf", [*named, f"run_dir={folder / 'run'}", *HF]))

    def make(folder: Path) -> None:
        save_gpt2(folder / "gpt2", write_text(folder / "text", train_lines=240))
        own = config(folder)
        in_stage("prepare", own, run_prepare)
        import_hf(own)
        _finish(own)

    return config(shared.made_once(tmp_path_factory, "hf", make))


@pytest.fixture(params=["transformer_lm", "awd_lstm", "hf"])
def causal(request: pytest.FixtureRequest) -> RunConfig:
    """Each of them in turn."""
    found: RunConfig = request.getfixturevalue(request.param)
    return found


def _finish(config: RunConfig) -> None:
    """From the checkpoint to results.json."""
    stages: list[tuple[str, Callable[..., object]]] = [
        ("datastore", run_datastore_write), ("index", run_index_build), ("knn", run_search), ("knn", run_tune),
        ("knn", run_evaluate),
    ]  # fmt: skip
    for stage, function in stages:
        in_stage(stage, config, function)
