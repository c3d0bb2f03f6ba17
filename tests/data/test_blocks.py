import numpy as np
import pytest

from distlm.data.blocks import Batch, Blocks, eval_blocks, gather, store_blocks, training_blocks
from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError

EOS, PAD = Dictionary.EOS, Dictionary.PAD


def corpus(lines: int, longest: int, seed: int = 0, last_line_ends: bool = True) -> np.ndarray:
    random = np.random.default_rng(seed)
    rows = [[*random.integers(4, 50, random.integers(0, longest)).tolist(), EOS] for _ in range(lines)]
    ids = np.array([token for row in rows for token in row], np.int32)
    return ids if last_line_ends else np.append(ids, np.int32(7))


def assert_tiles(blocks: Blocks, first: int, last: int) -> None:
    """Every token of [first, last) is scored by exactly one block, in order."""
    scored = np.concatenate([np.arange(a, b) for a, b in zip(blocks.start, blocks.end, strict=True)])
    assert np.array_equal(scored, np.arange(first, last))
    for offsets in (blocks.context_start, blocks.start, blocks.end):
        assert offsets.dtype == np.int64
    assert (blocks.context_start <= blocks.start).all() and (blocks.context_start >= 0).all()


@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (10, 3), (12, 3), (2, 5), (1001, 64)])
def test_training_blocks_tile_all_tokens_and_keep_the_short_last_one(tokens: int, length: int) -> None:
    blocks = training_blocks(tokens, length)
    assert_tiles(blocks, 0, tokens)
    assert len(blocks) == -(-tokens // length)
    assert (blocks.scored[:-1] == length).all() and 1 <= blocks.scored[-1] <= length
    assert np.array_equal(blocks.context_start, blocks.start)


@pytest.mark.parametrize(("tokens", "window", "block"), [(100, 16, 16), (101, 32, 8), (17, 16, 16), (50, 0, 7)])
def test_store_blocks_score_all_but_the_first_window_each_with_a_full_context(
    tokens: int, window: int, block: int
) -> None:
    blocks = store_blocks(tokens, window, block)
    assert_tiles(blocks, window, tokens)
    assert blocks.scored.sum() == tokens - window
    assert (blocks.start - blocks.context_start == window).all()
    assert (blocks.scored[:-1] == block).all()


def test_store_blocks_of_wikitext103_by_arithmetic_alone() -> None:
    blocks = store_blocks(103_227_021, 1536, 1536)
    assert blocks.scored.sum() == 103_225_485
    assert blocks.scored[-1] == 141
    # The published 67,206 counts the first block too, whose tokens are never keys.
    assert len(blocks) == 67_205
    assert len(training_blocks(103_227_021, 1536)) == 67_206
    assert len(training_blocks(103_227_021, 3072)) == 33_603


def test_store_blocks_of_the_longer_window_drop_that_window() -> None:
    assert store_blocks(103_227_021, 2560, 512).scored.sum() == 103_224_461


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("last_line_ends", [True, False])
def test_eval_blocks_pack_whole_lines_as_a_slow_loop_does(seed: int, last_line_ends: bool) -> None:
    ids = corpus(60, 20, seed, last_line_ends)
    blocks = eval_blocks(ids, context_window=40, block=24)
    assert_tiles(blocks, 0, len(ids))
    lines, start = [], 0
    for position, token in enumerate(ids):
        if token == EOS or position == len(ids) - 1:
            lines.append(position + 1 - start)
            start = position + 1
    sizes, current = [], 0
    for line in lines:
        if current and current + line > 24:
            sizes.append(current)
            current = 0
        current += line
    assert blocks.scored.tolist() == [*sizes, current]
    assert blocks.context_start.tolist() == [max(0, first - 40) for first in blocks.start]


def test_eval_blocks_cut_a_line_that_is_longer_than_a_block() -> None:
    ids = np.array([9] * 3 + [EOS] + [8] * 22 + [EOS] + [7, EOS], np.int32)
    blocks = eval_blocks(ids, context_window=5, block=10)
    # 4 tokens of line 1; line 2 (23 tokens) as 10 + 10 + 3, and line 3 packed with its rest.
    assert blocks.scored.tolist() == [4, 10, 10, 5]
    assert_tiles(blocks, 0, len(ids))


def test_eval_blocks_of_blank_lines_and_of_no_line_end_at_all() -> None:
    assert eval_blocks(np.full(7, EOS, np.int32), 4, 3).scored.tolist() == [3, 3, 1]
    assert eval_blocks(np.full(7, 9, np.int32), 4, 3).scored.tolist() == [3, 3, 1]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: store_blocks(100, 100, 10), "context_window=100 leaves nothing to store of a split with 100 tokens"),
        (lambda: store_blocks(100, -1, 10), "context_window is -1"),
        (lambda: store_blocks(100, 5, 0), "block is 0"),
        (lambda: training_blocks(0, 5), "tokens to train on is 0"),
        (lambda: training_blocks(5, 0), "train.tokens_per_sample"),
        (lambda: eval_blocks(np.zeros(0, np.int32), 4, 4), "tokens to score is 0"),
    ],
)
def test_impossible_plans_are_refused(make: object, complaint: str) -> None:
    with pytest.raises(DistlmError, match=complaint):
        make()  # type: ignore[operator]


def slow_gather(ids: np.ndarray, blocks: Blocks, indices: list[int], pad: int) -> Batch:
    rows = []
    for i in indices:
        row = []
        for t in range(blocks.context_start[i], blocks.end[i]):
            row.append((EOS if t == 0 else int(ids[t - 1]), int(ids[t]), bool(t >= blocks.start[i])))
        rows.append(row)
    longest = max(len(row) for row in rows)
    rows = [row + [(pad, pad, False)] * (longest - len(row)) for row in rows]
    table = np.array(rows, dtype=np.int64)
    return Batch(table[:, :, 0], table[:, :, 1], table[:, :, 2].astype(bool))


@pytest.mark.parametrize("indices", [[0], [0, 1, 2], [5, 0, 3], "last"])
def test_gather_equals_a_slow_loop(indices: list[int] | str) -> None:
    ids = corpus(40, 15)
    for blocks in (training_blocks(len(ids), 32), store_blocks(len(ids), 16, 24), eval_blocks(ids, 30, 16)):
        chosen = [len(blocks) - 1, 1] if isinstance(indices, str) else indices
        batch, expected = gather(ids, blocks, chosen), slow_gather(ids, blocks, chosen, PAD)
        for name in ("inputs", "targets", "scored"):
            assert np.array_equal(getattr(batch, name), getattr(expected, name)), name
            assert getattr(batch, name).dtype == (np.bool_ if name == "scored" else np.int64)


def test_scored_targets_of_all_batches_are_the_corpus_whatever_the_batch_size() -> None:
    ids = corpus(50, 12)
    blocks = eval_blocks(ids, 20, 16)
    for batch_blocks in (1, 3, 100):
        found = []
        for first in range(0, len(blocks), batch_blocks):
            batch = gather(ids, blocks, range(first, min(first + batch_blocks, len(blocks))))
            found.append(batch.targets[batch.scored])
        assert np.array_equal(np.concatenate(found), ids)


def test_gather_of_no_blocks_is_empty() -> None:
    assert gather(corpus(3, 5), training_blocks(5, 2), []).inputs.shape == (0, 0)


def test_an_id_outside_the_dictionary_is_named() -> None:
    ids = np.array([4, 5, 6, 99, 7])
    blocks = training_blocks(5, 2)
    with pytest.raises(DistlmError, match=r"token 3 has the id 99, the dictionary has 0 to 9"):
        gather(ids, blocks, [0, 1], vocabulary=10)
    assert gather(ids, blocks, [0, 2], vocabulary=10).targets.tolist() == [[4, 5], [7, 1]]
