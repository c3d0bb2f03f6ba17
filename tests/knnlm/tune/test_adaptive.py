"""λ by distance and the gate: planted structure is found, held-out figures are held out, the target is never seen."""

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.knn import copy_run, in_stage
from support.present import present
from support.records import alter

from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.losses import Losses
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.evaluate.state import evaluated_as_tuned, tuned_as_configured
from distlm.knnlm.scoring import interpolate, mean_loss, mix
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.tune.adaptive import Fitted, swapped
from distlm.knnlm.tune.buckets import Buckets, fit_buckets
from distlm.knnlm.tune.gate import BEFORE, SKIPS, Features, Gate, features_of, fit_gate, skip_curve
from distlm.knnlm.tune.records import GateValues, Tuned
from distlm.knnlm.tune.stage import run_tune
from distlm.runtime.rundir import RunDir


def mixture_data(shares, seed=0, noise=0.5):
    """log p_LM, log p_kNN of tokens drawn from (1 − share) p_LM + share p_kNN, so that `shares` [Q] are the best λ."""
    random = np.random.default_rng(seed)
    words = 20
    lm, knn = (random.dirichlet(np.full(words, noise), len(shares)) for _ in range(2))
    mixed = (1 - shares[:, None]) * lm + shares[:, None] * knn
    targets = (mixed.cumsum(axis=1) > random.random((len(shares), 1))).argmax(axis=1)
    place = np.arange(len(shares))
    return np.log(lm[place, targets]), np.log(knn[place, targets])


def test_weights_of_their_own_are_the_mixture_token_by_token():
    log_lm, log_knn = mixture_data(np.full(200, 0.3))
    log_knn[::7] = -math.inf
    weights = np.random.default_rng(0).random(200) * 0.9
    weights[::5] = 0
    mixed = mix(log_lm, log_knn, weights)
    expected = np.log((1 - weights) * np.exp(log_lm) + weights * np.exp(log_knn))
    np.testing.assert_allclose(mixed, expected, rtol=1e-12)
    assert mixed[weights == 0].tobytes() == log_lm[weights == 0].tobytes()
    np.testing.assert_allclose(mix(log_lm, log_knn, np.full(200, 0.25)), interpolate(log_lm, log_knn, 0.25), rtol=1e-13)


def test_planted_weights_by_distance_are_found():
    random = np.random.default_rng(1)
    nearest = random.gamma(2.0, 10.0, 40_000).astype(np.float32)
    shares = np.where(nearest < np.median(nearest), 0.6, 0.1)
    log_lm, log_knn = mixture_data(shares)
    buckets = fit_buckets(nearest, log_lm, log_knn, 4, 0.5)
    np.testing.assert_allclose(buckets.lambdas, [0.6, 0.6, 0.1, 0.1], atol=0.05)
    counts = np.bincount(np.searchsorted(buckets.edges, nearest, side="right"))
    assert counts.min() > 9_900
    loss = mean_loss(mix(log_lm, log_knn, buckets.weights(nearest)))
    best = min(mean_loss(interpolate(log_lm, log_knn, weight)) for weight in np.linspace(0, 0.95, 40))
    assert loss < best - 0.02


def test_absent_and_equal_distances_have_a_bucket():
    nearest = np.array([1.0] * 50 + [np.inf] * 10 + [2.0] * 40, np.float32)
    log_lm, log_knn = mixture_data(np.full(100, 0.4))
    log_knn[50:60] = -math.inf
    buckets = fit_buckets(nearest, log_lm, log_knn, 8, 0.33)
    weights = buckets.weights(nearest)
    assert (weights[50:60] == 0).all()
    assert len(set(weights[:50])) == 1
    assert np.isfinite(mix(log_lm, log_knn, weights)).all()
    assert fit_buckets(nearest[:0], log_lm[:0], log_knn[:0], 8, 0.33).weights(nearest)[0] == 0.33
    # No token at or below the smallest edge: the λ that was given.
    assert fit_buckets(nearest[:50], log_lm[:50], log_knn[:50], 8, 0.33).weights(np.array([0.5]))[0] == 0.33


def planted_gate(queries=12_000, seed=2):
    random = np.random.default_rng(seed)
    states = random.standard_normal((queries, 8)).astype(np.float16)
    shares = np.where(states[:, 3] > 0, 0.7, 0.05)
    log_lm, log_knn = mixture_data(shares, seed)
    return Features(states, random.standard_normal((queries, 2 * BEFORE)).astype(np.float32)), log_lm, log_knn


def test_the_gate_finds_what_decides_and_holds_on_other_tokens():
    features, log_lm, log_knn = planted_gate()
    half = np.arange(0, 12_000, 2)
    gate = fit_gate(features, half, log_lm, log_knn, 0.3)
    lambdas = gate.lambdas(features)
    assert lambdas.min() >= 0
    assert lambdas.max() < 1
    others = np.arange(1, 12_000, 2)
    gated = mean_loss(mix(log_lm, log_knn, lambdas)[others])
    constant = min(mean_loss(interpolate(log_lm, log_knn, weight)[others]) for weight in np.linspace(0, 0.95, 20))
    assert gated < constant - 0.02
    assert np.abs(gate.weights).argmax() == 3
    again = fit_gate(features, half, log_lm, log_knn, 0.3)
    np.testing.assert_array_equal(again.weights, gate.weights)
    kept = Gate.of(msgspec.json.decode(msgspec.json.encode(gate.record()), type=GateValues))
    np.testing.assert_array_equal(kept.lambdas(features), lambdas)


def test_the_curve_of_skipped_searches():
    features, log_lm, log_knn = planted_gate()
    gate = fit_gate(features, np.arange(12_000), log_lm, log_knn, 0.3)
    lambdas = gate.lambdas(features)
    gated = mix(log_lm, log_knn, lambdas)
    skipped, losses = skip_curve(lambdas, gate.thresholds, log_lm, gated)
    np.testing.assert_allclose(skipped, SKIPS, atol=1e-3)
    assert losses[0] == pytest.approx(mean_loss(gated), rel=1e-12)
    assert losses[-1] == pytest.approx(mean_loss(log_lm), rel=1e-12)
    # Half of the tokens gain nothing: leaving those out costs far less than leaving out any half.
    half = losses[SKIPS.index(0.5)]
    assert half - losses[0] < 0.3 * (losses[-1] - losses[0]) / 2


def test_features_never_see_the_target(searched, monkeypatch):
    run = RunDir(Path(searched.run_dir))
    neighbours = Neighbours.open(run.neighbours("valid"))
    dictionary = Dictionary.load(run.tokens(searched) / "dict.txt")
    before = features_of(neighbours, dictionary)
    place, units = 100, list(neighbours.units())
    changed = [unit.__class__(*(np.array(getattr(unit, name)) for name in unit.__dataclass_fields__)) for unit in units]
    changed[0].targets[place:] = 5
    changed[0].log_probs[place:] = -9.0
    changed[0].distances[:] = 1.0
    monkeypatch.setattr(Neighbours, "units", lambda self: iter(changed))
    after = features_of(neighbours, dictionary)
    np.testing.assert_array_equal(after.others[: place + 1], before.others[: place + 1])
    assert (after.others[place + 1] != before.others[place + 1]).any()
    np.testing.assert_array_equal(after.queries, before.queries)


def test_each_half_gets_what_the_other_was_fitted_on():
    halves = np.array([0, 1, 1, 0])
    fits = [Buckets(np.empty(0), np.array([0.1])), Buckets(np.empty(0), np.array([0.9]))]
    weights = swapped(fits, halves, lambda fit: fit.weights(np.zeros(4)))
    np.testing.assert_array_equal(weights, [0.9, 0.1, 0.1, 0.9])


def test_noise_looks_good_where_it_was_fitted_only():
    """64 weights on 640 tokens without any structure: the gain is of the fit, and cross-fitting shows none."""
    random = np.random.default_rng(5)
    nearest = random.random(640).astype(np.float32)
    log_lm, log_knn = mixture_data(np.full(640, 0.3), 5)
    constant = mean_loss(interpolate(log_lm, log_knn, 0.3))
    fitted = fit_buckets(nearest, log_lm, log_knn, 64, 0.3)
    assert mean_loss(mix(log_lm, log_knn, fitted.weights(nearest))) < constant - 0.01
    halves = np.arange(640) % 2
    fits = [fit_buckets(nearest[halves == h], log_lm[halves == h], log_knn[halves == h], 64, 0.3) for h in (0, 1)]
    held_out = swapped(fits, halves, lambda fit: fit.weights(nearest))
    assert mean_loss(mix(log_lm, log_knn, held_out)) > constant


def test_results_hold_the_frozen_fits(searched):
    run = RunDir(Path(searched.run_dir))
    tuned, results = (json.loads(path.read_text()) for path in (run.tuned, run.results))
    fitted = Fitted.of(Tuned.read(run.tuned))
    for name in ("buckets", "gate"):
        part = "knn_buckets" if name == "buckets" else "gate"
        assert results["splits"]["valid"][part]["loss_nats"] == pytest.approx(tuned[name]["loss_nats"], rel=1e-12)
    neighbours = Neighbours.open(run.neighbours("test"))
    units = list(neighbours.units())
    nearest = np.concatenate([unit.distances[:, 0] for unit in units])
    lm, knn = (Losses.open(run.losses, "test", name).nats for name in ("lm", "knn"))
    # p_kNN back from the mixture with the constant λ, then mixed with the frozen λ of each bucket.
    weight = tuned["lambda"]
    p_knn = (np.exp(-knn) - (1 - weight) * np.exp(-lm)) / weight
    own = present(fitted.buckets).whole.weights(nearest)
    by_hand = np.log((1 - own) * np.exp(-lm) + own * p_knn)
    np.testing.assert_allclose(-Losses.open(run.losses, "test", "knn_buckets").nats, by_hand, atol=1e-9)
    curve = results["splits"]["test"]["gate_curve"]
    assert curve["loss_nats"][-1] == pytest.approx(results["splits"]["test"]["lm"]["loss_nats"], rel=1e-12)
    assert curve["loss_nats"][0] == pytest.approx(results["splits"]["test"]["gate"]["loss_nats"], rel=1e-12)


def test_other_halves_than_those_fitted_on_are_refused(searched, tmp_path):
    config = copy_run(searched, tmp_path / "run")
    run = RunDir.of(config)
    alter(run.tuned, halves="0" * 32)
    with pytest.raises(DistlmError, match="other halves of valid"):
        in_stage("knn", config, run_evaluate)


def test_both_can_be_left_out_and_asked_for_again(searched, tmp_path):
    config = copy_run(searched, tmp_path / "run")
    run = RunDir.of(config)
    config.knn.buckets, config.knn.gate = 0, False
    assert not tuned_as_configured(config, run)
    in_stage("knn", config, run_tune)
    assert tuned_as_configured(config, run)
    assert not evaluated_as_tuned(config, run)
    in_stage("knn", config, run_evaluate)
    assert evaluated_as_tuned(config, run)
    assert not {"knn_buckets", "gate"} & set(json.loads(run.results.read_text())["splits"]["valid"])
