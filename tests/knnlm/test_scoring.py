"""Distances to probabilities: against a slow reference in plain Python, and the limits that λ, T and k must meet."""

import math

import numpy as np
import pytest
from support.knn import random_case

from distlm.knnlm.scoring import interpolate, knn_log_probs, mean_loss


def reference(distances, values, targets, temperature, k):
    """Eq. 2 word for word, with exact rational-free Python floats after taking out the smallest distance."""
    result = []
    for d, v, y in zip(distances.tolist(), values.tolist(), targets.tolist(), strict=True):
        kept = [(x, w) for x, w in zip(d[:k], v[:k], strict=True) if w >= 0]
        if not kept or all(w != y for _, w in kept):
            result.append(-math.inf)
            continue
        total = math.fsum(math.exp(-(x - kept[0][0]) / temperature) for x, _ in kept)
        hits = [x for x, w in kept if w == y]
        inside = math.fsum(math.exp(-(x - hits[0]) / temperature) for x in hits)
        result.append(-(hits[0] - kept[0][0]) / temperature + math.log(inside) - math.log(total))
    return np.array(result)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 30.0])
def test_scores_match_the_formula_for_every_k(temperature):
    distances, values, targets = random_case()
    ks = [12, 1, 5]
    scores = knn_log_probs(distances, values, targets, temperature, ks)
    for place, k in enumerate(ks):
        np.testing.assert_allclose(scores[place], reference(distances, values, targets, temperature, k), rtol=1e-12)
    assert np.isneginf(scores).any()
    assert np.isfinite(scores).any()


def test_chunking_changes_nothing(monkeypatch):
    case = random_case(queries=100)
    whole = knn_log_probs(*case, 2.0, [3, 12])
    monkeypatch.setattr("distlm.knnlm.scoring.CHUNK", 7 * 12)
    np.testing.assert_array_equal(knn_log_probs(*case, 2.0, [3, 12]), whole)


def test_far_hit_does_not_underflow():
    distances = np.array([[0.0, 5000.0]], np.float32)
    scores = knn_log_probs(distances, np.array([[1, 2]], np.int32), np.array([2], np.int32), 1.0)
    assert scores[0, 0] == -5000.0


def test_absent_neighbours_weigh_nothing():
    distances = np.array([[1.0, 2.0, np.inf, 0.0]], np.float32)
    values = np.array([[4, 5, -1, -1]], np.int32)
    scores = knn_log_probs(distances, values, np.array([5], np.int32), 1.0)
    np.testing.assert_allclose(scores, [[-1 - math.log1p(math.exp(-1))]], rtol=1e-12)
    nothing = knn_log_probs(
        np.full((1, 2), np.inf, np.float32), np.full((1, 2), -1, np.int32), np.zeros(1, np.int32), 1
    )
    assert np.isneginf(nothing).all()


def test_absent_value_is_no_hit_for_any_target():
    distances = np.array([[1.0, np.inf]], np.float32)
    scores = knn_log_probs(distances, np.array([[3, -1]], np.int32), np.array([0], np.int32), 1.0)
    assert np.isneginf(scores).all()


def test_hot_temperature_gives_the_unigram_over_neighbours():
    distances, values, targets = random_case(3)
    scores = knn_log_probs(distances, values, targets, 1e9)[0]
    with np.errstate(divide="ignore"):
        unigram = np.log((values == targets[:, None]).sum(1) / (values >= 0).sum(1).clip(1))
    np.testing.assert_allclose(scores, unigram, atol=1e-6)


def test_one_neighbour_gives_certainty_or_nothing():
    distances, values, targets = random_case(4)
    scores = interpolate(np.full(len(targets), -3.0), knn_log_probs(distances, values, targets, 1.0, [1])[0], 1.0)
    np.testing.assert_array_equal(scores, np.where(values[:, 0] == targets, 0.0, -np.inf))


def test_weight_zero_is_the_language_model_bit_for_bit():
    random = np.random.default_rng(0)
    log_lm = -random.gamma(2.0, 2.0, 1000)
    assert interpolate(log_lm, np.full(1000, -np.inf), 0.0).tobytes() == log_lm.tobytes()
    assert mean_loss(interpolate(log_lm, -random.gamma(2.0, 2.0, 1000), 0.0)) == mean_loss(log_lm)


def test_interpolation_is_the_mixture():
    random = np.random.default_rng(1)
    p, q = random.uniform(0.01, 1, 50), random.uniform(0.01, 1, 50)
    np.testing.assert_allclose(np.exp(interpolate(np.log(p), np.log(q), 0.3)), 0.3 * q + 0.7 * p, rtol=1e-13)
    never = interpolate(np.log(p), np.full(50, -np.inf), 0.25)
    np.testing.assert_allclose(never, np.log(p) + math.log(0.75), rtol=1e-13)


def test_probabilities_of_all_words_sum_to_one():
    distances, values, _ = random_case(5)
    full = values[:, 0] >= 0
    total = sum(
        np.exp(knn_log_probs(distances, values, np.full(len(values), word, np.int32), 3.0)[0]) for word in range(5)
    )
    np.testing.assert_allclose(total[full], 1.0, rtol=1e-12)


@pytest.mark.parametrize("temperature, ks", [(0.0, [1]), (1.0, [0]), (1.0, [13]), (1.0, [])])
def test_impossible_settings_are_refused(temperature, ks):
    with pytest.raises(ValueError):
        knn_log_probs(*random_case(), temperature, ks)
