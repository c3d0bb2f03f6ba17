"""Several stores in one mixture: the best shares are found, the sum is the mixture, foreign neighbours are refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.knn import copy_run, in_stage
from support.records import alter
from support.store import tiny_config

from distlm.analysis.report import write_report
from distlm.config.schema import RunConfig
from distlm.datastore.writer import run_datastore_write
from distlm.errors import DistlmError
from distlm.index import run_index_build
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.evaluate.state import evaluated_as_tuned, tuned_as_configured
from distlm.knnlm.evaluate.table import results_table
from distlm.knnlm.scoring import interpolate, knn_log_probs, mean_loss
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.stage import run_tune
from distlm.knnlm.tune.stores import fit_lambdas, mix_stores
from distlm.runtime.rundir import RunDir


def planted(shares, tokens=20_000, words=12, seed=0):
    """Tokens drawn from a mixture of several models with these shares; the log-probability of each under each."""
    random = np.random.default_rng(seed)
    models = random.dirichlet(np.full(words, 0.5), (len(shares), tokens))
    mixed = np.tensordot(shares, models, axes=1)
    targets = (mixed.cumsum(axis=1) > random.random((tokens, 1))).argmax(axis=1)
    return np.log(np.take_along_axis(models, np.broadcast_to(targets[:, None], (len(shares), tokens, 1)), 2)[..., 0])


def test_planted_shares_are_found_and_no_others_are_better():
    log_lm, *scores = planted([0.5, 0.3, 0.2])
    lambdas = fit_lambdas(log_lm, scores)
    np.testing.assert_allclose(lambdas, [0.3, 0.2], atol=0.02)
    best = mean_loss(mix_stores(log_lm, scores, lambdas))
    for step in ([0.02, 0], [-0.02, 0], [0, 0.02], [0, -0.02], [0.02, -0.02]):
        assert mean_loss(mix_stores(log_lm, scores, lambdas + step)) > best


def test_the_mixture_is_the_sum_and_one_store_the_usual_one():
    log_lm, *scores = planted([0.5, 0.3, 0.2], 300)
    scores[0][::4] = -math.inf
    mixed = mix_stores(log_lm, scores, np.array([0.3, 0.1]))
    expected = 0.6 * np.exp(log_lm) + 0.3 * np.exp(scores[0]) + 0.1 * np.exp(scores[1])
    np.testing.assert_allclose(mixed, np.log(expected), rtol=1e-12)
    one = mix_stores(log_lm, scores[:1], np.array([0.3]))
    np.testing.assert_allclose(one, interpolate(log_lm, scores[0], 0.3), rtol=1e-12)
    np.testing.assert_array_equal(mix_stores(log_lm, scores, np.zeros(2)), log_lm)


def test_a_useless_store_gets_next_to_nothing():
    log_lm, useful, _ = planted([0.6, 0.4, 0.0])
    assert fit_lambdas(log_lm, [useful, np.full(len(log_lm), -math.inf)])[1] < 1e-6


@pytest.fixture(scope="module")
def other(searched, tmp_path_factory) -> RunConfig:
    """The same tokens and model, the keys of another hidden state."""
    run = RunDir(Path(searched.run_dir))
    config = tiny_config(
        tmp_path_factory.mktemp("other") / "run", Path(searched.data.text_dir),
        [f"data.tokens_dir={run.tokens(searched)}", f"datastore.checkpoint={run.model_checkpoint(searched)}",
         "datastore.tap=output"],
    )  # fmt: skip
    for name, function in (("datastore", run_datastore_write), ("index", run_index_build), ("knn", run_search)):
        in_stage(name, config, function)
    return config


def test_two_stores_are_tuned_and_frozen(searched, other, tmp_path):
    config = copy_run(searched, tmp_path / "run")
    run = RunDir.of(config)
    config.knn.extra_runs = [other.run_dir]
    assert not tuned_as_configured(config, run)
    in_stage("knn", config, run_tune)
    in_stage("knn", config, run_evaluate)
    assert tuned_as_configured(config, run)
    assert evaluated_as_tuned(config, run)
    tuned, results = (json.loads(path.read_text()) for path in (run.tuned, run.results))
    stores = tuned["stores"]
    assert len(stores["lambdas"]) == len(stores["stores"]) == 2
    assert results["splits"]["valid"]["stores"]["loss_nats"] == pytest.approx(stores["loss_nats"], rel=1e-12)
    assert stores["loss_nats"] <= tuned["loss_nats"] + 1e-6

    p = 1 - sum(stores["lambdas"])
    mixed = p * np.exp(Neighbours.open(run.neighbours("test")).log_probs())
    places = (run, RunDir(Path(other.run_dir)))
    for place, store, weight in zip(places, stores["stores"], stores["lambdas"], strict=True):
        parts = [knn_log_probs(u.distances, u.values, u.targets, store["temperature"], [store["k"]])[0]
                 for u in Neighbours.open(place.neighbours("test")).units()]  # fmt: skip
        mixed += weight * np.exp(np.concatenate(parts))
    assert results["splits"]["test"]["stores"]["loss_nats"] == pytest.approx(-np.log(mixed).mean(), rel=1e-9)
    assert "several stores" in results_table(Results.read(run.results))
    assert f"{other.run_dir}: λ {stores['lambdas'][1]:.3f}" in write_report(run).read_text("utf-8")
    assert "knn" in results["splits"]["test"]["bootstrap"]["differences"]["stores"]


@pytest.mark.parametrize(("key", "theirs"), [("model", "x"), ("tokens", 7), ("context_rule", "x")])
def test_neighbours_of_something_else_are_refused(searched, other, tmp_path, key, theirs):
    config, foreign = copy_run(searched, tmp_path / "run"), copy_run(other, tmp_path / "other")
    path = RunDir(Path(foreign.run_dir)).neighbours("valid") / "manifest.json"
    alter(path, **{key: theirs})
    config.knn.extra_runs = [str(tmp_path / "other")]
    with pytest.raises(DistlmError, match=f"knn.extra_runs: .*{key} {theirs}"):
        in_stage("knn", config, run_tune)


def test_an_extra_run_that_was_searched_anew_is_tuned_anew(searched, other, tmp_path):
    config, foreign = copy_run(searched, tmp_path / "run"), copy_run(other, tmp_path / "other")
    config.knn.extra_runs = [foreign.run_dir]
    in_stage("knn", config, run_tune)
    path = RunDir(Path(foreign.run_dir)).neighbours("valid") / "manifest.json"
    alter(path, nprobe=1)
    with pytest.raises(DistlmError, match="distlm knn tune"):
        in_stage("knn", config, run_evaluate)
