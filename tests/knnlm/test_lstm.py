"""An AWD-LSTM with what the transformer has: neural cache, datastore, neighbours."""

import json

import pytest
import torch
from support import write_text
from support.knn import in_stage
from support.store import tiny_config

from distlm.data.prepare import run_prepare
from distlm.data.tokens import TokenFiles
from distlm.datastore.reader import Datastore
from distlm.datastore.writer import run_datastore_write
from distlm.index import run_index_build
from distlm.knnlm.cache.stage import run_cache
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.evaluate.table import results_table
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.search.states import States
from distlm.knnlm.tune.stage import run_tune
from distlm.models.awd_lstm.config import LstmConfig
from distlm.models.awd_lstm.model import TAPS
from distlm.models.described import build_model
from distlm.models.io import save_model
from distlm.runtime.files import write_json
from distlm.runtime.rundir import RunDir

SETTINGS = [
    "model.kind=awd_lstm", "train.optimizer=nt_asgd", "lstm.width=16", "lstm.hidden_width=24", "lstm.layers=2",
    f"datastore.tap={TAPS[-1]}", "datastore.key_dtype=float32", "cache.windows=[20,60]", "cache.thetas=[0.5,2.0]",
]  # fmt: skip


@pytest.fixture
def config(tmp_path):
    """An untrained AWD-LSTM and its token files."""
    config = tiny_config(tmp_path / "run", write_text(tmp_path / "text"), SETTINGS)
    in_stage("prepare", config, run_prepare)
    run = RunDir.of(config)
    dictionary = TokenFiles.open(run.tokens(config)).dictionary
    torch.manual_seed(0)
    folder = run.checkpoint(1)
    model = build_model(config.section(LstmConfig), len(dictionary))
    save_model(model, folder, {"dictionary": dictionary.hash, "step": 1})
    write_json(folder / "complete.json", {"step": 1})
    write_json(run.checkpoints / "best.json", {"checkpoint": folder.name, "valid_loss": 1.0})
    return config


def test_an_lstm_is_evaluated_with_a_cache_alone(config):
    for function in (run_cache, run_tune, run_evaluate):
        in_stage("knn", config, function)
    run = RunDir.of(config)
    results = json.loads(run.results.read_text())
    assert States.open(run.states("valid")).tap == TAPS[-1]
    assert set(results["splits"]["valid"]) >= {"lm", "cache"}
    assert "+ cache" in results_table(Results.read(run.results))


def test_an_lstm_is_evaluated_as_a_knn_lm(config):
    """Datastore, index, search, cache: LM, +kNN, +cache and both. Keys are the states that the search looks up."""
    in_stage("datastore", config, run_datastore_write)
    in_stage("index", config, run_index_build)
    for function in (run_search, run_cache, run_tune, run_evaluate):
        in_stage("knn", config, function)
    run = RunDir.of(config)
    store, found = Datastore.open(run.datastore), Neighbours.open(run.neighbours("valid"))
    assert store.tap == found.manifest.tap == TAPS[-1]
    # The first tokens have no full context and are not stored (datastore.context_window).
    assert store.rows == len(TokenFiles.open(run.tokens(config)).split("train")) - config.datastore.context_window
    results = json.loads(run.results.read_text())["splits"]["valid"]
    # An untrained model knows nothing, so what is remembered must help.
    perplexity = {name: results[name]["perplexity"] for name in ("lm", "knn", "cache", "both")}
    assert perplexity["both"] <= min(perplexity["knn"], perplexity["cache"])
    assert max(perplexity["knn"], perplexity["cache"]) < perplexity["lm"]
