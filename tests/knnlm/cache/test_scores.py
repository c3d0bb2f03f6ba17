"""The neural cache's log-probabilities against a direct fp64 computation token by token."""

import math

import numpy as np
import pytest
import torch
from support.knn.cache import per_token

from distlm.knnlm.cache import scores as core
from distlm.knnlm.cache.scores import add_cache, block_bytes, cache_log_probs, first_cached, rows_of_block

WINDOWS, THETAS = [3, 40, 150], [0.05, 1.0, 6.0]


def text(tokens=420, width=6, vocabulary=15, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((tokens, width)).astype(np.float32), random.integers(0, vocabulary, tokens)


@pytest.mark.parametrize("fill", ["full", "partial"])
def test_every_window_and_theta_agrees_with_the_direct_computation(fill, monkeypatch):
    monkeypatch.setattr(core, "_MOST_ROWS", 37)
    states, words = text()
    scores = cache_log_probs(torch.from_numpy(states), torch.from_numpy(words), 0, 0, WINDOWS, THETAS, fill)
    assert scores.shape == (3, 3, 420)
    for row, window in enumerate(WINDOWS):
        for column, theta in enumerate(THETAS):
            direct = per_token(states, words, window, theta, fill)
            np.testing.assert_allclose(scores[row, column], direct, rtol=1e-6, atol=2e-5)
            assert np.isnan(scores[row, column]).sum() == first_cached(window, fill)
    assert np.isneginf(scores).any()


def test_a_piece_of_the_text_gives_the_same_as_the_whole():
    states, words = text()
    whole = cache_log_probs(torch.from_numpy(states), torch.from_numpy(words), 0, 0, WINDOWS, THETAS)
    piece = cache_log_probs(torch.from_numpy(states[90:300]), torch.from_numpy(words[90:300]), 90, 250, WINDOWS, THETAS)
    np.testing.assert_allclose(piece, whole[..., 250:300], rtol=1e-6)
    with pytest.raises(ValueError, match="do not hold what token 250"):
        cache_log_probs(torch.from_numpy(states[150:]), torch.from_numpy(words[150:]), 150, 250, WINDOWS, THETAS)


def test_threads_change_no_bit():
    states, words = text(tokens=3000)
    arguments = (torch.from_numpy(states), torch.from_numpy(words), 0, 0, [500], [0.3])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cache_log_probs(*arguments)
        torch.set_num_threads(3)
        np.testing.assert_array_equal(cache_log_probs(*arguments), one)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_far_hits_and_strong_attention_do_not_underflow():
    """A hit 300 nats below the nearest state, and a short window far below a long one."""
    states = np.zeros((6, 2), np.float32)
    states[:, 0] = [30.0, 1.0, 1.0, 1.0, 1.0, 10.0]
    words = np.array([1, 2, 3, 4, 5, 2])
    scores = cache_log_probs(torch.from_numpy(states), torch.from_numpy(words), 0, 5, [2, 4, 5], [1.0], "partial")
    np.testing.assert_allclose(scores[:, 0, 0], [-np.inf, -math.log(4), -290.0], rtol=1e-6)


def test_one_repeated_word_is_certain():
    states, _ = text(tokens=60)
    scores = cache_log_probs(torch.from_numpy(states), torch.zeros(60, dtype=torch.int64), 0, 0, [7], [1.0])
    np.testing.assert_allclose(scores[0, 0, 8:], 0.0, atol=1e-6)


def test_weight_zero_and_tokens_without_a_cache_keep_their_probability():
    log_lm = np.log(np.array([0.5, 0.25, 0.1]))
    log_cache = np.array([np.nan, np.log(0.5), -np.inf])
    assert add_cache(log_lm, log_cache, 0.0) is log_lm
    mixed = add_cache(log_lm, log_cache, 0.2)
    assert mixed[0] == log_lm[0]
    np.testing.assert_allclose(np.exp(mixed[1:]), [0.8 * 0.25 + 0.2 * 0.5, 0.8 * 0.1], rtol=1e-14)


def test_memory_is_bounded_for_any_window():
    for window in (1, 500, 3785, 20_000, 60_000):
        assert rows_of_block(window) * (window + rows_of_block(window)) * 38 == block_bytes(window) <= 80_000_000


def test_tokens_before_the_first_window_cost_nothing(monkeypatch):
    """The blocks that are computed are the same as if the early ones had been computed too."""
    states, words = text(tokens=2000)
    scored = []
    original = core._score_block

    def score_block(*args):
        scored.append(args[3])
        return original(*args)

    monkeypatch.setattr(core, "_score_block", score_block)
    arguments = (torch.from_numpy(states), torch.from_numpy(words), 0, 0, [1200], [0.3])
    full = cache_log_probs(*arguments)
    step = rows_of_block(1200)
    assert min(scored) == 1201 // step * step > 0
    partial = cache_log_probs(*arguments, fill="partial")
    np.testing.assert_array_equal(full[..., 1201:], partial[..., 1201:])
    assert np.isnan(full[..., :1201]).all()
