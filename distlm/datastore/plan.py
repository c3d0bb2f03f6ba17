"""The shard plan: which blocks, rows and tokens are in which shard, whatever the number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distlm.data.blocks import Blocks, Ints, store_blocks
from distlm.errors import UsageError


@dataclass(frozen=True)
class ShardPlan:
    """One shard: the unit of work. Half-open ranges: blocks [first_block, end_block), tokens [token_start, token_end).

    Row `first_row + i` holds the key that predicts token `token_start + i`, and that token as its value.
    """

    index: int
    first_block: int
    end_block: int
    first_row: int
    rows: int
    token_start: int
    token_end: int


@dataclass(frozen=True)
class StorePlan:
    """All shards of a store and the blocks they score."""

    blocks: Blocks
    batch_blocks: int
    rows_per_shard: int
    """Rows of every shard but the last: rounded down to whole batches, at least one batch."""
    shards: tuple[ShardPlan, ...]

    @property
    def rows(self) -> int:
        """N = tokens − context_window."""
        return sum(shard.rows for shard in self.shards)

    def batches(self, shard: ShardPlan) -> Iterator[Ints]:
        """Block numbers of each forward pass of a shard, int64 [≤ batch_blocks], in order."""
        for first in range(shard.first_block, shard.end_block, self.batch_blocks):
            yield np.arange(first, min(first + self.batch_blocks, shard.end_block), dtype=np.int64)


def plan_store(
    tokens: int,
    context_window: int,
    block: int,
    batch_blocks: int,
    rows_per_shard: int,
    max_positions: int | None = None,
) -> StorePlan:
    """Shards of whole batches. The batches are part of the plan because what a block is batched with can change the
    last bits of its keys, so a shard has the same bytes on any number of ranks.

    WikiText-103 with 1536/1536/2 and a million rows per shard: N = 103,225,485 (Khandelwal et al. section 3) in 104
    shards of 998,400 rows, the last one shorter. Raises DistlmError when no token is left to store, or when context
    and block are longer than the model's `max_positions`.
    """
    if max_positions is not None and context_window + block > max_positions:
        raise UsageError(
            f"datastore.context_window={context_window} + datastore.block={block}: {context_window + block} tokens are "
            f"more than the model's max_positions={max_positions}; make one of them smaller"
        )
    blocks = store_blocks(tokens, context_window, block)
    shard_blocks = max(1, rows_per_shard // (block * batch_blocks)) * batch_blocks
    shards = []
    for index, first in enumerate(range(0, len(blocks), shard_blocks)):
        end = min(first + shard_blocks, len(blocks))
        token_start, token_end = int(blocks.start[first]), int(blocks.end[end - 1])
        shards.append(
            ShardPlan(index, first, end, token_start - context_window, token_end - token_start, token_start, token_end)
        )
    return StorePlan(blocks, batch_blocks, shard_blocks * block, tuple(shards))
