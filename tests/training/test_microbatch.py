"""Micro-batches are dealt by the plan; a batch that does not divide is refused with the nearest that does."""

import pytest

from distlm.config.training import UpdatesConfig
from distlm.errors import DistlmError
from distlm.training.microbatch import micro_seed, plan_micro_batches


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_every_block_is_taken_once(ranks: int) -> None:
    plan = plan_micro_batches(UpdatesConfig(blocks_per_update=12, micro_blocks=2), ranks)
    update = list(range(12))
    dealt = [[update[plan.blocks_of(micro)] for micro in plan.of_rank(rank)] for rank in range(ranks)]
    assert {len(mine) for mine in dealt} == {plan.accumulation} == {6 // ranks}
    assert sorted(block for mine in dealt for micro in mine for block in micro) == update


@pytest.mark.parametrize(
    ("blocks", "micro", "ranks", "mend"),
    [
        (24, 5, 1, "set train.blocks_per_update=25"),
        (4, 1, 3, "set train.blocks_per_update=3 or start 2 ranks"),
        (8, 4, 4, "set train.blocks_per_update=16 or start 2 ranks"),
        (7, 1, 3, "set train.blocks_per_update=6 or start 1 ranks"),
    ],
)
def test_batch_that_does_not_divide_names_the_nearest(blocks: int, micro: int, ranks: int, mend: str) -> None:
    with pytest.raises(DistlmError) as caught:
        plan_micro_batches(UpdatesConfig(blocks_per_update=blocks, micro_blocks=micro), ranks)
    assert mend in str(caught.value)
    assert f"train.blocks_per_update={blocks}" in str(caught.value)


def test_seeds_of_dropout_are_distinct_and_stable() -> None:
    seeds = {micro_seed(seed, update, micro) for seed in range(3) for update in range(50) for micro in range(8)}
    assert len(seeds) == 3 * 50 * 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    # A changed hash would change the masks of a run that is continued.
    assert micro_seed(1, 2, 3) == micro_seed(1, 2, 3) == STABLE


STABLE = 4482306795351528384
