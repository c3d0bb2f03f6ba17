"""Hidden states of a batch: the scored positions, in block order."""

import numpy as np
import pytest
import torch
from support.present import present

from distlm.data.blocks import eval_blocks, gather, store_blocks
from distlm.datastore.extract import batches_of_hidden_states, hidden_states
from distlm.errors import DistlmError
from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import TransformerLM


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = TransformerConfig(layers=2, width=32, heads=2, ffn_width=64, cutoffs=[20, 40], max_positions=96)
    return TransformerLM(config, 64).eval()


@pytest.fixture(scope="module")
def ids():
    random = np.random.default_rng(0)
    tokens = random.integers(4, 64, 700).astype(np.int32)
    tokens[random.random(700) < 0.1] = 2
    return tokens


def test_keys_and_log_probs_of_the_scored_positions_only(model, ids):
    blocks = eval_blocks(ids, 40, 30)
    chosen = [3, 0, 7]
    got = hidden_states(model, ids, blocks, chosen, "last_ffn_input", with_log_probs=True)
    wanted = np.concatenate([np.arange(blocks.start[i], blocks.end[i]) for i in chosen])
    np.testing.assert_array_equal(got.targets, ids[wanted])
    assert got.keys.shape == (len(wanted), 32)
    assert got.keys.dtype == present(got.log_probs).dtype == torch.float32
    batch = gather(ids, blocks, chosen)
    with torch.no_grad():
        output = model(torch.from_numpy(batch.inputs), tap="last_ffn_input")
        full = model.full_log_probs(output.hidden[torch.from_numpy(batch.scored)])
    torch.testing.assert_close(got.keys, output.tapped[torch.from_numpy(batch.scored)])
    torch.testing.assert_close(got.log_probs, full.gather(1, got.targets[:, None])[:, 0])


def test_stopping_at_the_tap_gives_the_same_keys(model, ids):
    blocks = store_blocks(len(ids), 32, 32)
    with_lm = hidden_states(model, ids, blocks, [0, 20], "last_ffn_input", with_log_probs=True)
    alone = hidden_states(model, ids, blocks, [0, 20], "last_ffn_input")
    assert alone.log_probs is None
    assert torch.equal(alone.keys, with_lm.keys)


def test_the_short_last_block_is_whole(model, ids):
    blocks = store_blocks(len(ids), 32, 32)
    got = hidden_states(model, ids, blocks, [len(blocks) - 1], "last_ffn_input")
    assert len(got.targets) == (700 - 32) % 32
    np.testing.assert_array_equal(got.targets, ids[-len(got.targets) :])


def test_many_rows_are_scored_in_pieces_with_the_same_result(model, ids, monkeypatch):
    blocks = store_blocks(len(ids), 32, 32)
    whole = hidden_states(model, ids, blocks, range(8), "output", with_log_probs=True)
    monkeypatch.setattr("distlm.datastore.extract._SOFTMAX_ROWS", 50)
    pieces = hidden_states(model, ids, blocks, range(8), "output", with_log_probs=True)
    torch.testing.assert_close(pieces.log_probs, whole.log_probs)


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_come_in_order_whatever_the_threads(model, ids, threads):
    blocks = store_blocks(len(ids), 32, 32)
    batches = [[0, 1], [2], [3, 4, 5], [6], [7, 8], [20]]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = list(batches_of_hidden_states(model, ids, blocks, batches, "last_ffn_input", with_log_probs=True))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.set_num_threads(1)
    try:
        alone = [hidden_states(model, ids, blocks, batch, "last_ffn_input", with_log_probs=True) for batch in batches]
    finally:
        torch.set_num_threads(before)
    for one, other in zip(got, alone, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(present(one.log_probs), present(other.log_probs))


def test_a_failure_in_a_pass_reaches_the_caller_and_threads_are_given_back(model, ids):
    blocks, before = store_blocks(len(ids), 32, 32), torch.get_num_threads()
    with pytest.raises(IndexError):
        list(batches_of_hidden_states(model, ids, blocks, [[0], [1], [999], [2]], "output"))
    assert torch.get_num_threads() == before


def test_an_unknown_tap_is_refused(model, ids):
    with pytest.raises(DistlmError, match="tap='nowhere'"):
        hidden_states(model, ids, store_blocks(len(ids), 32, 32), [0], "nowhere")
