"""Micro-batches are dealt by the plan; a batch that does not divide is refused with the smallest change that helps."""

import re
from collections.abc import Callable
from itertools import product

import pytest

from distlm.config.training import UpdatesConfig
from distlm.errors import UsageError
from distlm.training.microbatch import MicroBatchPlan, micro_seed, plan_micro_batches, plan_pieces


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_every_block_is_taken_once(ranks: int) -> None:
    plan = plan_micro_batches(UpdatesConfig(blocks_per_update=12, micro_blocks=2), ranks)
    update = list(range(12))
    dealt = [[update[plan.blocks_of(micro)] for micro in plan.of_rank(rank)] for rank in range(ranks)]
    assert {len(mine) for mine in dealt} == {plan.accumulation} == {6 // ranks}
    assert sorted(block for mine in dealt for micro in mine for block in micro) == update


@pytest.mark.parametrize(
    ("blocks", "micro", "ranks", "advice"),
    [
        (24, 5, 1, "set train.micro_blocks=4, which leaves the update as it is"),
        (24, 2, 8, "set train.micro_blocks=1, which leaves the update as it is; or start 6 ranks"),
        (24, 24, 8, "set train.micro_blocks=3, which leaves the update as it is; or start 1 rank"),
        (4, 1, 3, "set train.blocks_per_update=3; or start 2 ranks"),
        (8, 4, 4, "set train.micro_blocks=2, which leaves the update as it is; or start 2 ranks"),
        (7, 1, 3, "set train.blocks_per_update=6; or start 1 rank"),
        (25, 5, 8, "set train.blocks_per_update=24 and train.micro_blocks=3; or start 5 ranks"),
    ],
)
def test_batch_that_does_not_divide_names_the_smallest_change(blocks: int, micro: int, ranks: int, advice: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_micro_batches(UpdatesConfig(blocks_per_update=blocks, micro_blocks=micro), ranks)
    assert str(caught.value).endswith(f"; {advice}")


@pytest.mark.parametrize("plan", [plan_micro_batches, lambda train, ranks: plan_pieces(train, ranks, "a")])
def test_what_a_refusal_advises_works(plan: Callable[[UpdatesConfig, int], MicroBatchPlan]) -> None:
    refused = 0
    for blocks, micro, ranks in product(range(1, 30), range(1, 30), range(1, 10)):
        try:
            plan(UpdatesConfig(blocks_per_update=blocks, micro_blocks=micro), ranks)
        except UsageError as error:
            refused += 1
            advice = str(error).rpartition("; set ")[2]
            found = {name: int(value) for name, value in re.findall(r"train\.(\w+)=(\d+)", advice)}
            new = UpdatesConfig(**{"blocks_per_update": blocks, "micro_blocks": micro} | found)
            plan(new, ranks)
            assert new.blocks_per_update == blocks or blocks % ranks, "an update that the ranks divide stays"
            assert abs(new.blocks_per_update - blocks) < ranks
            if fewer := re.search(r"start (\d+) rank", advice):
                plan(UpdatesConfig(blocks_per_update=blocks, micro_blocks=micro), int(fewer[1]))
    assert refused > 1000


def test_seeds_of_dropout_are_distinct_and_stable() -> None:
    seeds = {micro_seed(seed, update, micro) for seed in range(3) for update in range(50) for micro in range(8)}
    assert len(seeds) == 3 * 50 * 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    # A changed hash would change the masks of a run that is continued.
    assert micro_seed(1, 2, 3) == micro_seed(1, 2, 3) == STABLE


STABLE = 4482306795351528384
