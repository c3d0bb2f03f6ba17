"""Lengths of forward passes that the settings leave open: few tokens are computed twice, and the model takes them."""

import pytest

from distlm.datastore.lengths import LONGEST, block_lengths
from distlm.datastore.plan import plan_store


@pytest.mark.parametrize("positions", [8, 96, 512, 1024, 2048, 8192, 65536])
def test_an_open_pass_is_as_long_as_the_model_takes_and_an_eighth_context(positions: int) -> None:
    window, block = block_lengths(-1, 0, positions)
    assert window + block == min(positions, LONGEST) and window == (window + block) // 8
    plan = plan_store(200_000, window, block, 2, 1_000_000, positions)
    assert plan.blocks.lengths.sum() / plan.rows < 1.17


def test_what_is_given_is_kept() -> None:
    assert block_lengths(512, 512, 1024) == (512, 512)
    assert block_lengths(0, 0, 1024) == (0, 1024)
    assert block_lengths(512, 0, 8192) == (512, 1536)
    # A longer context is not run through for fewer stored tokens than it has, where the model takes as many.
    assert block_lengths(1536, 0, 8192) == (1536, 1536) and block_lengths(1536, 0, 2048) == (1536, 512)
    assert block_lengths(1000, 0, 8192, 1024) == (1000, 1000) and block_lengths(256, 0, 8192, 1024) == (256, 768)
    assert block_lengths(-1, 512, 8192) == (73, 512) and block_lengths(-1, 512, 520) == (8, 512)
    assert block_lengths(-1, 3, 8192) == (1, 3) and block_lengths(-1, 600, 512) == (0, 600)
