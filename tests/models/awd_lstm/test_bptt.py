"""Columns and chunk lengths: nothing is lost, lengths are drawn as in the paper, any update is found by its number."""

import numpy as np
import pytest

from distlm.errors import DistlmError
from distlm.models.awd_lstm.bptt import ChunkPlan, columns_of


def test_columns_are_contiguous_and_leave_out_the_remainder() -> None:
    columns = columns_of(np.arange(23), 4, "awd.batch", "train")
    assert columns.tolist() == [list(range(start, start + 5)) for start in (0, 5, 10, 15)]
    with pytest.raises(DistlmError, match=r"awd.batch=9 columns of the train split .23 tokens.* choose awd.batch=7"):
        columns_of(np.arange(23), 9, "awd.batch", "train")


def test_chunks_tile_an_epoch_and_are_found_by_update_number() -> None:
    plan = ChunkPlan(2000, 70, True, seed=5, epochs=3, finetune_epochs=1)
    update = 0
    for epoch in range(4):
        start = 0
        for number, (first, length, drawn) in enumerate(plan.epoch(epoch)):
            chunk = plan.chunk(update)
            assert (chunk.epoch, chunk.number, chunk.start, chunk.length) == (epoch, number, first, length)
            assert first == start and length == min(drawn, 1999 - first) and length >= 2
            start, update = start + drawn, update + 1
            assert chunk.last == (update == plan.ends[epoch])
        assert start >= 1998, "the last chunk reaches the last target but one at least"
    assert update == plan.updates
    assert plan.epoch(0) != plan.epoch(1) != ChunkPlan(2000, 70, True, 6, 3, 1).epoch(1)


def test_lengths_are_normal_around_70_and_35() -> None:
    plan = ChunkPlan(700_000, 70, True, seed=1, epochs=1, finetune_epochs=1)
    drawn = np.array([length for _, _, length in plan.epoch(0)])
    assert 67.3 < drawn.mean() < 68.3, "0.95·70 + 0.05·35, less a half for the integer part"
    short = drawn[drawn < 52]
    assert 0.04 < len(short) / len(drawn) < 0.06
    assert 4.7 < drawn[drawn >= 52].std() < 5.3 and 4 < short.std() < 6
    capped = np.array([length for _, _, length in plan.epoch(1)])
    assert drawn.max() > 80 and capped.max() == 80, "fine-tuning caps at bptt + 10"


def test_fixed_lengths_and_short_corpora() -> None:
    plan = ChunkPlan(100, 30, False, 1, 1, 0)
    assert plan.epoch(0) == ((0, 30, 30), (30, 30, 30), (60, 30, 30), (90, 9, 30))
    with pytest.raises(DistlmError, match=r"awd.bptt=100 is longer than the corpus: a column has 100 tokens"):
        ChunkPlan(100, 100, True, 1, 1, 0)
