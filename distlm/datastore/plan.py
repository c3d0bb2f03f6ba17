"""The shard plan: which blocks, rows and tokens are in which shard, whatever the number of ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from distlm.data.blocks import Blocks, Ints, require_fit, store_blocks

MOST_UNITS = 32_768
"""About so many units of a store at most: each has an entry in the record of an unfinished one."""


@dataclass(frozen=True)
class ShardPlan:
    """One shard: a file of keys and one of values. Half-open ranges: blocks [first_block, end_block), tokens
    [token_start, token_end).

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
class Unit:
    """Rows [first, first + rows) of a shard: the unit of work."""

    shard: int
    number: int
    """In the shard, from 0."""
    first: int
    rows: int

    @property
    def key(self) -> str:
        """Its name in records."""
        return f"{self.shard}/{self.number}"


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

    @property
    def unit_count(self) -> int:
        """Units of all shards."""
        return sum(-(-shard.rows // self.unit_rows) for shard in self.shards)

    @property
    def unit_rows(self) -> int:
        """Rows of a unit but the last one of a shard: one batch, or as many batches as leave about MOST_UNITS.

        A batch is the least that can be computed alone, because what a block is batched with may change its last bits.
        No byte of a store depends on its units: they may be as small as that, and any number of ranks divides them.
        """
        batch = int(self.blocks.scored[0]) * self.batch_blocks
        return batch * max(1, self.rows // (MOST_UNITS * batch))

    def units(self, shard: ShardPlan, unit_rows: int = 0) -> list[Unit]:
        """The units of a shard, of `unit_rows` rows (0: as planned now)."""
        return cut(shard.index, shard.rows, unit_rows or self.unit_rows)

    def batches(self, shard: ShardPlan, first: int = 0, rows: int = 0) -> Iterator[Ints]:
        """Block numbers of each forward pass of a shard, int64 [≤ batch_blocks], in order; of its rows
        [first, first + rows) alone, which are whole batches (0: all)."""
        block = int(self.blocks.scored[shard.first_block])
        begin = shard.first_block + first // block
        end = min(shard.end_block, begin - (-rows // block)) if rows else shard.end_block
        for number in range(begin, end, self.batch_blocks):
            yield np.arange(number, min(number + self.batch_blocks, end), dtype=np.int64)


def cut(shard: int, rows: int, step: int) -> list[Unit]:
    """The units of a shard of so many rows, each of `step` but the last."""
    return [Unit(shard, number, first, min(step, rows - first)) for number, first in enumerate(range(0, rows, step))]


def following(units: Sequence[Unit]) -> list[list[Unit]]:
    """Runs of units of one shard that follow each other."""
    runs = groupby(enumerate(units), key=lambda at: (at[1].shard, at[1].number - at[0]))
    return [[unit for _, unit in run] for _, run in runs]


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
    if max_positions is not None:
        require_fit(context_window, block, max_positions, "datastore.")
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
