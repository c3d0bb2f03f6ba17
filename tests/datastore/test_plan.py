"""The shard plan: counts, ranges, whole batches."""

import re

import numpy as np
import pytest

from distlm.datastore.plan import plan_store
from distlm.errors import DistlmError, UsageError


def test_wikitext103_has_the_papers_number_of_keys():
    plan = plan_store(103_227_021, 1536, 1536, 2, 1_000_000, 3072)
    assert plan.rows == 103_225_485
    assert len(plan.blocks) == 67_205
    assert plan.blocks.end[-1] - plan.blocks.start[-1] == 141
    assert plan.rows_per_shard == 998_400 == 325 * 2 * 1536
    assert len(plan.shards) == 104
    assert {shard.rows for shard in plan.shards[:-1]} == {998_400}
    assert plan.shards[-1].rows == 103_225_485 - 103 * 998_400


@pytest.mark.parametrize(
    ("tokens", "context", "block", "batch", "per_shard"),
    [(1000, 32, 32, 4, 300), (1000, 0, 7, 3, 1), (129, 128, 64, 2, 1000), (4096, 96, 10, 1, 25)],
)
def test_shards_cover_every_row_once_in_whole_batches(tokens, context, block, batch, per_shard):
    plan = plan_store(tokens, context, block, batch, per_shard)
    assert plan.rows == tokens - context
    assert plan.shards[0].token_start == context
    assert plan.shards[-1].token_end == tokens
    covered = []
    for number, shard in enumerate(plan.shards):
        assert shard.index == number
        assert shard.first_row == shard.token_start - context
        assert shard.rows == shard.token_end - shard.token_start
        # Whole batches: as many rows as fit in rows_per_shard, and at least one batch.
        assert shard.rows <= max(per_shard, block * batch)
        batches = list(plan.batches(shard))
        assert all(len(indices) == batch for indices in batches[:-1])
        if number < len(plan.shards) - 1:
            assert len(batches[-1]) == batch
            assert shard.rows == plan.rows_per_shard
        covered += [index for indices in batches for index in indices]
    assert covered == list(range(len(plan.blocks)))
    assert sum(shard.rows for shard in plan.shards) == plan.rows


def test_batches_do_not_depend_on_the_shard_size():
    small = plan_store(5000, 32, 16, 4, 64)
    large = plan_store(5000, 32, 16, 4, 10_000)
    cut = [list(indices) for shard in small.shards for indices in small.batches(shard)]
    assert cut == [list(indices) for shard in large.shards for indices in large.batches(shard)]
    assert len(small.shards) == 78
    assert len(large.shards) == 1


def test_nothing_left_to_store_is_refused():
    with pytest.raises(DistlmError, match="context_window=64 leaves nothing to store of a split with 64 tokens"):
        plan_store(64, 64, 32, 1, 100)
    assert plan_store(65, 64, 32, 1, 100).rows == 1


def test_blocks_longer_than_the_model_are_refused():
    with pytest.raises(DistlmError, match=r"datastore.context_window=64 \+ datastore.block=33.*max_positions=96"):
        plan_store(1000, 64, 33, 1, 100, max_positions=96)
    assert plan_store(1000, 64, 32, 1, 100, max_positions=96).rows == 936
    for window, block, mend in ((64, 33, (63, 33)), (0, 200, (0, 96)), (64, 97, (64, 32)), (200, 200, (48, 48)),
                                (96, 1, (95, 1)), (8, 96, (0, 96))):  # fmt: skip
        with pytest.raises(UsageError) as refused:
            plan_store(1000, window, block, 1, 100, max_positions=96)
        # What is advised, followed.
        advised = {"context_window": window, "block": block}
        advised |= {name: int(value) for name, value in re.findall(r"datastore\.(\w+)=(\d+)", str(refused.value))}
        assert (advised["context_window"], advised["block"]) == mend
        assert plan_store(1000, *mend, 1, 100, max_positions=96).rows == 1000 - mend[0]


def test_context_is_between_the_window_and_the_window_plus_a_block():
    plan = plan_store(1000, 32, 16, 2, 100)
    context = plan.blocks.start - plan.blocks.context_start
    assert np.all(context == 32)
