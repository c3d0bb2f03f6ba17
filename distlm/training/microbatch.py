"""Micro-batches: the unit of work of training, decided by the plan and never by the rank count."""

import struct
from dataclasses import dataclass

import xxhash

from distlm.config.training import UpdatesConfig
from distlm.errors import DistlmError, UsageError


@dataclass(frozen=True)
class MicroBatchPlan:
    """How one update's blocks are cut into micro-batches and dealt to the ranks."""

    micro_blocks: int
    """Blocks in one micro-batch."""
    micro_batches: int
    """Micro-batches M in one update, over all ranks."""
    ranks: int
    """Ranks R."""

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one update: M / R."""
        return self.micro_batches // self.ranks

    def of_rank(self, rank: int) -> range:
        """Numbers of the micro-batches of one rank: r, r + R, …"""
        return range(rank, self.micro_batches, self.ranks)

    def blocks_of(self, micro: int) -> slice:
        """Where the blocks of a micro-batch lie in the update's list of blocks."""
        return slice(micro * self.micro_blocks, (micro + 1) * self.micro_blocks)


def plan_micro_batches(train: UpdatesConfig, ranks: int) -> MicroBatchPlan:
    """Deal an update's micro-batches to `ranks` ranks.

    Raises DistlmError, with the nearest valid values, when micro_blocks does not divide blocks_per_update or the
    micro-batches do not divide over the ranks.
    """
    blocks, micro = train.blocks_per_update, train.micro_blocks
    if blocks % micro:
        raise UsageError(
            f"train.micro_blocks={micro} does not divide train.blocks_per_update={blocks}; "
            f"set train.blocks_per_update={_nearest(blocks, micro)}"
        )
    count = blocks // micro
    if count % ranks:
        fitting = max(size for size in range(1, ranks) if count % size == 0)
        raise UsageError(
            f"train.blocks_per_update={blocks} with train.micro_blocks={micro} gives {count} micro-batches, which do "
            f"not divide over {ranks} ranks; set train.blocks_per_update={_nearest(blocks, micro * ranks)} or start "
            f"{fitting} ranks"
        )
    return MicroBatchPlan(micro, count, ranks)


def plan_pieces(train: UpdatesConfig, ranks: int, whose: str) -> MicroBatchPlan:
    """The cut of `train.*` for models whose memory sees all of a micro-batch; see cut_rows."""
    rows, micro = ("train.blocks_per_update", train.blocks_per_update), ("train.micro_blocks", train.micro_blocks)
    return cut_rows(rows, micro, ranks, f": {whose}", "train.micro_blocks=")


def cut_rows(rows: tuple[str, int], micro: tuple[str, int], ranks: int, whose: str, mend: str) -> MicroBatchPlan:
    """Micro-batches of `micro` rows over all ranks, each cut into one piece per rank; both are (setting, value).

    Number n of the plan is piece n mod R of micro-batch n // R. `whose` and `mend` are words of the message.
    Raises DistlmError, with the nearest valid values, when rows do not divide.
    """
    (rows_name, count), (micro_name, size) = rows, micro
    if count % size:
        raise DistlmError(
            f"{micro_name}={size} does not divide {rows_name}={count}; set "
            f"{rows_name}={max(1, round(count / size)) * size}"
        )
    if size % ranks:
        fitting = max(fewer for fewer in range(1, ranks) if size % fewer == 0)
        raise DistlmError(
            f"{micro_name}={size}{whose} micro-batch is of all ranks, and {ranks} ranks do not divide it; set "
            f"{mend}{max(1, round(size / ranks)) * ranks} or start {fitting} ranks"
        )
    return MicroBatchPlan(size // ranks, count // size * ranks, ranks)


def micro_seed(seed: int, update: int, micro: int) -> int:
    """Seed of the random numbers (dropout) of one micro-batch: a hash, so that neighbours are unrelated.

    It names the work and not the rank, so masks do not depend on the rank count and a resumed run needs no state.
    """
    return xxhash.xxh3_64_intdigest(struct.pack("<3q", seed, update, micro)) >> 1


def _nearest(value: int, multiple: int) -> int:
    return max(1, round(value / multiple)) * multiple
