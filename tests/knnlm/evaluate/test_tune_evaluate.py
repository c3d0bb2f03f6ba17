"""Tuning and evaluation from files: planted optima, frozen settings, and refusals."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.knn import copy_run, in_stage
from support.knn.files import NEIGHBOURS
from support.present import present
from support.records import alter

from distlm.config.schema import KnnConfig
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.shuffled import shuffle_values
from distlm.knnlm.evaluate.stage import Frozen, Parts, evaluate_parts, run_evaluate
from distlm.knnlm.evaluate.state import evaluated_as_tuned, tuned_as_configured
from distlm.knnlm.evaluate.table import results_table
from distlm.knnlm.scoring import interpolate, knn_log_probs, mean_loss
from distlm.knnlm.search.neighbours import Neighbours, Unit, unit_folder, write_unit
from distlm.knnlm.search.records import NeighboursManifest
from distlm.knnlm.tune.grid import best_of, grid_losses
from distlm.knnlm.tune.records import Tuned
from distlm.knnlm.tune.stage import edge_warnings, run_tune
from distlm.runtime.rundir import RunDir

VOCABULARY = 50


def write_neighbours(folder, distances, values, targets, log_probs, units=3):
    """Finished search results of these arrays, cut into units."""
    rows = []
    for number, part in enumerate(np.array_split(np.arange(len(targets)), units)):
        unit = Unit(
            np.zeros((len(part), 2), np.float16), targets[part].astype(np.int32), log_probs[part],
            np.where(values[part] < 0, -1, 7), distances[part].astype(np.float32), values[part].astype(np.int32),
        )  # fmt: skip
        write_unit(unit_folder(folder, number), unit)
        rows.append({"rows": len(part), "hashes": {}})
    facts = {**NEIGHBOURS, "tokens": len(targets), "k": distances.shape[1], "units": rows}
    NeighboursManifest.of(facts, folder).write(folder / "manifest.json")
    return Neighbours.open(folder)


def informative(folder, share=0.25, temperature=4.0, queries=6000, k=8, uninformative=False, seed=0):
    """Targets drawn from the mixture `share` p_kNN(T) + (1 − share) p_LM, so that those settings are the best ones."""
    random = np.random.default_rng(seed)
    distances = np.sort(random.gamma(2.0, 4.0, (queries, k)), axis=1)
    values = np.array([random.choice(VOCABULARY, k, replace=False) for _ in range(queries)])
    weights = np.exp(-distances / temperature)
    weights /= weights.sum(1, keepdims=True)
    picked = np.array([random.choice(row, p=weight) for row, weight in zip(values, weights, strict=True)])
    targets = np.where(random.random(queries) < share, picked, random.integers(0, VOCABULARY, queries))
    if uninformative:
        targets = random.integers(0, VOCABULARY, queries)
    return write_neighbours(folder, distances, values, targets, np.full(queries, -math.log(VOCABULARY)))


def grid(**settings):
    return KnnConfig(lambdas=[0.0, 0.1, 0.25, 0.45], temperatures=[1.0, 4.0, 16.0], ks=[2, 8], **settings)


def test_the_planted_optimum_is_found(tmp_path):
    knn = grid()
    losses = grid_losses(informative(tmp_path), knn)
    best = best_of(losses, knn.lambdas, knn.temperatures, knn.ks)
    assert (best.weight, best.temperature, best.k) == (0.25, 4.0, 8)
    assert best.loss == losses.min() == losses[1, 1, 2]
    np.testing.assert_allclose(losses[:, :, 0], math.log(VOCABULARY), rtol=1e-15)


def test_of_equal_losses_the_smallest_weight_wins():
    best = best_of(np.zeros((2, 2, 3)), [0.3, 0.1, 0.2], [2.0, 1.0], [8, 4])
    assert (best.weight, best.k, best.temperature) == (0.1, 4, 1.0)


def test_a_best_value_at_the_end_of_its_grid_is_reported():
    knn = grid()
    inside = best_of(np.array([[[1, 1, 0, 1]] * 1, [[1, 1, 1, 1]]]), knn.lambdas, [4.0], [2, 8])
    assert edge_warnings(inside, knn, 8) == []
    losses = np.ones((2, 3, 4))
    losses[1, 2, 3] = 0
    words = " ".join(edge_warnings(best_of(losses, knn.lambdas, knn.temperatures, knn.ks), knn, 8))
    for expected in ("λ=0.45 is the largest", "temperature=16.0 is the largest", "k=8 is the largest", "larger knn.k"):
        assert expected in words
    zero = edge_warnings(best_of(np.ones((2, 3, 4)), knn.lambdas, knn.temperatures, knn.ks), knn, 8)
    assert zero == ["the best λ is 0: the neighbours do not help on this split"]


def evaluated(neighbours, frozen):
    """One split's entry of results.json, from its neighbours alone."""
    return evaluate_parts(Parts(neighbours.manifest.split, neighbours, None, None), frozen, None)[1]


def test_permuted_values_cost_what_the_mixture_gives_away(tmp_path):
    """Uninformative neighbours of a frozen λ = 0.25: the loss is the LM's − ln 0.75, less what hits win by chance."""
    neighbours = informative(tmp_path / "plain")
    frozen = Frozen(0.25, 4.0, 8, "valid", "")
    result = evaluated(neighbours, frozen)
    check = present(result.shuffled)
    assert check.ceiling_nats == pytest.approx(math.log(VOCABULARY) + 0.28768, abs=1e-5)
    assert result.lm.loss_nats + 0.05 < check.loss_nats < check.ceiling_nats
    assert not check.alarm
    assert present(result.knn).loss_nats < result.lm.loss_nats < check.loss_nats


def test_values_of_no_target_reach_the_ceiling_exactly():
    random = np.random.default_rng(0)
    log_lm = -random.gamma(2.0, 1.0, 300)
    distances = np.sort(random.gamma(2.0, 4.0, (300, 4)), axis=1).astype(np.float32)
    values = np.full((300, 4), 9, np.int32)
    scores = knn_log_probs(distances, values, np.zeros(300, np.int32), 1.0)[0]
    assert mean_loss(interpolate(log_lm, scores, 0.25)) == pytest.approx(mean_loss(log_lm) - math.log(0.75), rel=1e-13)


def test_misaligned_values_raise_the_alarm(tmp_path):
    neighbours = informative(tmp_path, uninformative=True)
    assert present(evaluated(neighbours, Frozen(0.25, 4.0, 8, "valid", "")).shuffled).alarm


def test_shuffling_keeps_the_values_and_the_absent_places():
    values = np.array([[1, 2, -1], [3, 4, 5], [6, -1, -1]], np.int32)
    shuffled = shuffle_values(values, 0)
    np.testing.assert_array_equal(shuffled < 0, values < 0)
    np.testing.assert_array_equal(np.sort(shuffled, axis=None), np.sort(values, axis=None))
    assert (shuffled != values).any()
    np.testing.assert_array_equal(shuffle_values(values, 0), shuffled)


def test_results_agree_with_the_files_and_the_table_shows_them(searched):
    run = RunDir(Path(searched.run_dir))
    results, tuned = json.loads(run.results.read_text()), json.loads(run.tuned.read_text())
    for split, figures in results["splits"].items():
        neighbours = Neighbours.open(run.neighbours(split))
        loss = -math.fsum(neighbours.log_probs()) / neighbours.tokens
        assert figures["lm"]["loss_nats"] == pytest.approx(loss, rel=1e-14)
        assert figures["lm"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-12)
        assert figures["tokens"] == neighbours.tokens
    assert results["splits"]["valid"]["knn"]["perplexity"] == tuned["perplexity"]
    assert results["splits"]["valid"]["lm"]["perplexity"] == tuned["lm_perplexity"]
    assert tuned["perplexity"] < tuned["lm_perplexity"]
    assert results["tuned_on"] == "valid"
    assert set(results["seconds"]) >= {"prepare", "datastore write", "index merge", "knn search", "knn tune",
                                       "knn evaluate"}  # fmt: skip
    table = results_table(Results.read(run.results))
    for shown in (f"{tuned['perplexity']:.2f}", "4,311 rows", "IVF16,PQ4", "nprobe=4", "every token is scored once"):
        assert shown in table
    # </s> is a word like any other: as many of them as lines.
    text = Path(searched.data.text_dir) / "test.txt"
    words = [len(line.split()) + 1 for line in text.read_text().splitlines()]
    assert results["splits"]["test"]["tokens"] == sum(words)


def test_tuning_never_opens_another_split(searched, tmp_path):
    config = copy_run(searched, tmp_path / "run")
    run = RunDir.of(config)
    before = run.tuned.read_bytes()
    shutil.rmtree(run.neighbours("test"))
    (run.tokens(config) / "test.bin").unlink()
    run.tuned.unlink()
    in_stage("knn", config, run_tune)
    assert run.tuned.read_bytes() == before


def test_weight_zero_gives_the_language_model_exactly(searched, tmp_path):
    config = copy_run(searched, tmp_path / "run", "knn.lambdas=[0.0]")
    run = RunDir.of(config)
    in_stage("knn", config, run_tune)
    in_stage("knn", config, run_evaluate)
    for figures in json.loads(run.results.read_text())["splits"].values():
        assert figures["knn"] == figures["lm"]


def test_settings_tuned_on_other_neighbours_are_refused(searched, tmp_path):
    config = copy_run(searched, tmp_path / "run")
    run = RunDir.of(config)
    tuned = run.tuned.read_bytes()
    alter(run.tuned, neighbours="0" * 32)
    with pytest.raises(DistlmError, match="tuned on other neighbours"):
        in_stage("knn", config, run_evaluate)
    run.tuned.write_bytes(tuned)
    config.knn.splits = ["test", "valid"]
    with pytest.raises(DistlmError, match=r"tuned on 'valid'.*names 'test' first"):
        in_stage("knn", config, run_evaluate)
    run.tuned.unlink()
    with pytest.raises(DistlmError, match="run `distlm knn tune` first"):
        in_stage("knn", config, run_evaluate)


@pytest.mark.parametrize(
    ("key", "other"),
    [("datastore", "x"), ("model", "x"), ("index", "x"), ("token_files", "x"), ("key_dtype", "x")],
)
def test_a_split_made_from_something_else_is_refused(searched, tmp_path, key, other):
    config = copy_run(searched, tmp_path / "run")
    path = RunDir.of(config).neighbours("test") / "manifest.json"
    alter(path, **{key: other})
    with pytest.raises(DistlmError, match=f"{key} {other}, .* belong to another {key}"):
        in_stage("knn", config, run_evaluate)


def test_more_neighbours_than_were_searched_are_left_out_with_a_word(searched, tmp_path, capsys):
    config = copy_run(searched, tmp_path / "run")
    config.knn.ks = [8, 32]
    in_stage("knn", config, run_tune)
    assert present(Tuned.read(RunDir.of(config).tuned).grid).ks == [8]
    assert "knn.ks=[32] is above knn.k=16 and left out" in capsys.readouterr().err


def test_another_grid_is_tuned_in_the_same_directory(searched, tmp_path):
    config = copy_run(searched, tmp_path / "run")
    run = RunDir.of(config)
    assert tuned_as_configured(config, run)
    assert evaluated_as_tuned(config, run)
    config.knn.temperatures = [100.0, 1000.0]
    assert not tuned_as_configured(config, run)
    in_stage("knn", config, run_tune)
    assert tuned_as_configured(config, run)
    assert not evaluated_as_tuned(config, run)
    in_stage("knn", config, run_evaluate)
    assert evaluated_as_tuned(config, run)
    assert json.loads(run.results.read_text())["settings"]["temperature"] >= 100
