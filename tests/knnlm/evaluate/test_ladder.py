"""The exactness ladder: its rungs against what they claim to be, and that it is not climbed twice."""

import json

import numpy as np
import pytest
from support.knn import copy_run, in_stage
from support.records import alter

from distlm.datastore.reader import Datastore
from distlm.index import open_index
from distlm.index.choose.measure import recall
from distlm.index.search import gpu as gpu_search
from distlm.knnlm.evaluate import stage as evaluate
from distlm.knnlm.evaluate.ladder import exactness_ladder
from distlm.knnlm.evaluate.parts import read_frozen
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.evaluate.table import results_table
from distlm.knnlm.scoring import interpolate, knn_log_probs, mean_loss
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.records import Tuned
from distlm.knnlm.tune.stage import run_tune
from distlm.runtime.records import replaced
from distlm.runtime.rundir import RunDir


def opened(config):
    run = RunDir.of(config)
    store = Datastore.open(run.datastore)
    neighbours = Neighbours.open(run.neighbours("test"))
    return run, store, neighbours, read_frozen(Tuned.read(run.tuned))


def test_of_all_tokens_each_rung_is_a_search_of_that_kind(searched, tmp_path):
    """`rescored` is what the run kept, `exact` a direct computation over all keys in fp64."""
    run, store, neighbours, frozen = opened(searched)
    ladder = exactness_ladder(store, open_index(run.index, store), neighbours, frozen, 10**9)
    results = json.loads(run.results.read_text())["splits"]["test"]
    assert ladder.queries == neighbours.tokens
    assert ladder.rescored.loss_nats == pytest.approx(results["knn"]["loss_nats"], abs=1e-6)
    assert ladder.lm.loss_nats == pytest.approx(results["lm"]["loss_nats"], rel=1e-12)

    units = list(neighbours.units())
    queries, targets = (np.concatenate([getattr(unit, name) for unit in units]) for name in ("queries", "targets"))
    keys = np.concatenate([np.asarray(store.keys(shard.index)) for shard in store.shards]).astype(np.float64)
    values = np.concatenate([np.asarray(store.values(shard.index)) for shard in store.shards])
    wide = queries.astype(np.float64)
    distances = (wide**2).sum(1)[:, None] + (keys**2).sum(1) - 2 * wide @ keys.T
    near = np.argsort(distances, axis=1, kind="stable")[:, : frozen.k]
    sorted_distances = np.take_along_axis(distances, near, 1).astype(np.float32)
    scores = knn_log_probs(sorted_distances, values[near], targets, frozen.temperature)[0]
    exact = mean_loss(interpolate(neighbours.log_probs(), scores, frozen.weight))
    assert ladder.exact.loss_nats == pytest.approx(exact, abs=2e-4)
    assert ladder.exact.recall == 1
    own = np.concatenate([unit.ids for unit in units])[:, : frozen.k]
    assert ladder.rescored.recall == pytest.approx(recall(own, near), abs=2e-3)
    assert ladder.rescored.recall < 1
    assert ladder.quantised.loss_nats != ladder.rescored.loss_nats


def test_all_lists_and_room_to_rerank_give_the_oracle(searched):
    run, store, neighbours, frozen = opened(searched)
    manifest = replaced(neighbours.manifest, nprobe=10**6, k=store.rows)
    ladder = exactness_ladder(store, open_index(run.index, store), Neighbours(neighbours.folder, manifest), frozen, 40)
    assert ladder.queries == 40
    assert ladder.rescored.recall > 0.999
    assert ladder.rescored.loss_nats == pytest.approx(ladder.exact.loss_nats, abs=1e-5)
    assert ladder.quantised.recall < ladder.rescored.recall


def test_it_is_in_the_results_and_kept_while_nothing_changes(searched, tmp_path, monkeypatch):
    config = copy_run(searched, tmp_path / "run")
    run = RunDir.of(config)
    before = json.loads(run.results.read_text())
    assert before["ladder"]["split"] == "test"
    assert "recall" in results_table(Results.read(run.results))
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "exactness_ladder", None)
        in_stage("knn", config, run_evaluate)
        assert json.loads(run.results.read_text())["ladder"] == before["ladder"]
        config.knn.ladder_sample = 0
        in_stage("knn", config, run_evaluate)
        assert json.loads(run.results.read_text())["ladder"] is None
    config.knn.ladder_sample = 8
    # What cannot be read does not stand in the way of the evaluation that writes it anew.
    alter(run.results, ladder=1)
    in_stage("knn", config, run_evaluate)
    assert json.loads(run.results.read_text())["ladder"]["queries"] == 8


def test_without_a_gpu_it_is_that_of_the_search_on_one(searched, tmp_path, monkeypatch):
    """The stage is given no GPU on a cluster."""
    monkeypatch.setattr(gpu_search, "gpu_device", lambda: "")
    config = copy_run(searched, tmp_path / "run", "knn.scan=gpu")
    path = RunDir.of(config).results
    before = json.loads(path.read_text())["ladder"]
    path.unlink()
    in_stage("knn", config, run_evaluate)
    assert json.loads(path.read_text())["ladder"] == before


def test_without_an_index_there_is_no_ladder(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run", "knn.search=brute", "knn.splits=[valid]")
    for function in (run_search, run_tune, run_evaluate):
        in_stage("knn", config, function)
    assert json.loads(RunDir.of(config).results.read_text())["ladder"] is None
