"""An AWD-LSTM with what the transformer has: neural cache, datastore, neighbours."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import write_text
from support.knn import copy_run, in_stage
from support.lstm import UNTRAINED, untrained_lstm
from support.present import present
from support.store import file_hashes, tiny_config

from distlm.api.run import open_run
from distlm.data.blocks import eval_blocks
from distlm.data.dictionary import Dictionary
from distlm.data.tokens import TokenFiles
from distlm.datastore.reader import Datastore
from distlm.datastore.writer import run_datastore_write
from distlm.errors import Stopped, UsageError
from distlm.index import run_index_build
from distlm.integrations.reading import of_run
from distlm.knnlm.cache.plan import plan_cache
from distlm.knnlm.cache.stage import run_cache
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.evaluate.table import results_table
from distlm.knnlm.plan import READ_FIRST, plan_search
from distlm.knnlm.search.carried import CARRIED, PART, states_before
from distlm.knnlm.search.forward import open_forward
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.search.states import States
from distlm.knnlm.tune.stage import run_tune
from distlm.models.awd_lstm.model import TAPS, AwdLstm
from distlm.models.awd_lstm.stream_loss import stream_loss
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.world import resolve_world
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage
from distlm.runtime.stop import StopFlag

SETTINGS = [*UNTRAINED, "cache.windows=[20,60]", "cache.thetas=[0.5,2.0]"]


@pytest.fixture
def config(tmp_path):
    """An untrained AWD-LSTM and its token files."""
    return untrained_lstm(tmp_path, SETTINGS)


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


def carrying(config, tmp_path, *more):
    """A copy of the run that reads each split in one go."""
    return copy_run(config, tmp_path / "carried", *SETTINGS, "knn.carry=true", "knn.context_window=0", *more)


def test_a_carried_state_gives_the_perplexity_of_reading_in_one_go(config, tmp_path):
    """The cache's language model is then the one that `distlm evaluate` measures, and that of the table's first row."""
    config = carrying(config, tmp_path)
    for function in (run_cache, run_tune, run_evaluate):
        in_stage("knn", config, function)
    run = RunDir.of(config)
    forward = in_stage("knn", config, open_forward)
    results = Results.read(run.results)
    assert "in one go" in results.context_rule
    assert isinstance(forward.model, AwdLstm)
    for split in ("valid", "test"):
        ids = forward.tokens.split(split)
        whole = stream_loss(forward.model, np.concatenate([[Dictionary.EOS], ids])[None], 256) / len(ids)
        assert results.splits[split].figures("lm").perplexity == pytest.approx(math.exp(whole), rel=1e-6)
        assert not (run.states(split) / CARRIED).exists()


@pytest.mark.parametrize("scan", ["queries", "lists"])
def test_a_search_carries_the_state_as_well(config, tmp_path, scan):
    config = carrying(config, tmp_path, f"knn.scan={scan}")
    in_stage("datastore", config, run_datastore_write)
    in_stage("index", config, run_index_build)
    in_stage("knn", config, run_search)
    run = RunDir.of(config)
    forward = in_stage("knn", config, open_forward)
    ids = forward.tokens.split("valid")
    # By hand: one pass over all of it.
    words = torch.tensor([Dictionary.EOS, *ids[:-1].tolist()])[None]
    with torch.inference_mode():
        wanted = forward.model(words, tap=TAPS[-1]).tapped[0]
    found = np.concatenate([np.asarray(unit.queries) for unit in Neighbours.open(run.neighbours("valid")).units()])
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert not (run.neighbours("valid") / CARRIED).exists()
    # The states of the search are those that the cache needs.
    assert in_stage("knn", config, run_cache)["forward_tokens"] == 0


def test_reading_in_one_go_is_stopped_and_goes_on(config, tmp_path):
    """What was read before the stop is not read again, and the states are those of an undisturbed start."""
    config = carrying(config, tmp_path, "knn.block=8")
    run = RunDir.of(config)
    forward = in_stage("knn", config, open_forward)
    ids = forward.tokens.split("valid")
    whole = states_before(forward.model, ids, eval_blocks(ids, 0, 8))
    read: list[int] = []

    def stopped_after(blocks):
        stop, model = StopFlag(0), type(forward.model)
        taken = model.read

        def reads(own, words, state):
            read.append(len(words))
            if len(read) == blocks:
                stop.reason = "SIGTERM"
            return taken(own, words, state)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "read", reads)
            stage = Stage("knn", config, resolve_world(), SingleComm(), stop, run)
            return run_cache(stage)

    with pytest.raises(Stopped, match="goes on"):
        stopped_after(5)
    part = np.load(run.states("valid") / PART)
    assert np.array_equal(part, whole[:6]) and not (run.states("valid") / CARRIED).exists()
    assert len(read) == 5
    stopped_after(-1)
    blocks = sum(len(eval_blocks(forward.tokens.split(split), 0, 8)) - 1 for split in ("valid", "test"))
    assert len(read) == blocks
    one = file_hashes(run.states("valid"))
    shutil.rmtree(run.states("valid"))
    shutil.rmtree(run.cache("valid"))
    stopped_after(-1)
    assert file_hashes(run.states("valid")) == one and not {PART, CARRIED} & one.keys()


def test_the_plan_counts_what_one_rank_reads(config, tmp_path):
    config = carrying(config, tmp_path)
    in_stage("datastore", config, run_datastore_write)
    for plan in (plan_search, plan_cache):
        one, many = plan(config, 1), plan(config, 64)
        assert READ_FIRST in one.notes and READ_FIRST in many.notes
        plain = copy_run(config, tmp_path / f"plain-{plan.__name__}", *SETTINGS, "knn.carry=false")
        assert READ_FIRST not in plan(plain, 64).notes
        assert present(many.seconds) > present(plan(plain, 64).seconds)


def test_python_reads_a_text_in_one_go_too(config, tmp_path):
    config = carrying(config, tmp_path)
    for function in (run_cache, run_tune, run_evaluate):
        in_stage("knn", config, function)
    run = RunDir.of(config)
    ids = TokenFiles.open(run.tokens(config)).split("valid")
    scores = open_run(run.root).log_probs(ids, knn=False)
    lm = Results.read(run.results).splits["valid"].figures("lm")
    assert math.exp(-scores.lm.mean()) == pytest.approx(lm.perplexity, rel=1e-6)
    text = (Path(config.data.text_dir) / "valid.txt").read_text("utf-8")
    assert of_run(run.root, "lm").log_prob(text) == pytest.approx(scores.lm.sum(), rel=1e-6)


def test_only_a_model_with_a_state_carries_one(tmp_path):
    text = write_text(tmp_path / "text")
    with pytest.raises(UsageError, match=r"knn\.carry=True: a transformer_lm has no state to carry; leave it out"):
        tiny_config(tmp_path / "run", text, ["knn.carry=true", "knn.context_window=0"])
    with pytest.raises(
        UsageError, match=r"knn\.context_window=\d+: knn\.carry=true reads a split in one go; set it to 0, or"
    ):
        tiny_config(tmp_path / "run", text, [*SETTINGS, "knn.carry=true"])
