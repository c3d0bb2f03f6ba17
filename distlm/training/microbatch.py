"""Micro-batches: the unit of work of training, decided by the plan and never by the rank count."""

import struct
from dataclasses import dataclass

import xxhash

from distlm.config.training import UpdatesConfig
from distlm.errors import UsageError


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

    Raises UsageError, with the nearest valid values, when micro_blocks does not divide blocks_per_update or the
    micro-batches do not divide over the ranks.
    """
    blocks, micro = train.blocks_per_update, train.micro_blocks
    rest, count = blocks % micro, blocks // micro
    if rest or count % ranks:
        why = f"train.micro_blocks={micro} does not divide train.blocks_per_update={blocks}"
        if not rest:
            why = (
                f"train.blocks_per_update={blocks} with train.micro_blocks={micro} gives {count} micro-batches, which "
                f"do not divide over {ranks} ranks"
            )
        names = "train.blocks_per_update", "train.micro_blocks"
        raise UsageError(f"{why}; {mend(names, (blocks, micro), 1, ranks, 0 if rest else fewer(count, ranks))}")
    return MicroBatchPlan(micro, count, ranks)


MOST_ROWS = 1 << 20
"""Rows of a forward pass that advice goes up to."""


def fewer(count: int, ranks: int) -> int:
    """The largest number of ranks below `ranks` that divides `count`."""
    return max(less for less in range(1, max(ranks, 2)) if count % less == 0)


def mend(names: tuple[str, str], now: tuple[int, int], over: int, ranks: int, less: int) -> str:
    """What to set so that an update divides over the ranks, the smallest change first.

    `names`: settings of the rows of an update and of a micro-batch, `now`: their values; `over`: ranks that a
    micro-batch is for; `less`: ranks that would do, 0: none. The update, which the result depends on, stays wherever
    the ranks divide it, and is else the nearest that they divide. A micro-batch needs no more memory than now.
    """
    count, size = now
    of_rank = count // ranks if count % ranks == 0 else max(1, round(count / ranks))
    most = min(of_rank, size // over, MOST_ROWS)
    fits = max((rows for rows in range(1, most + 1) if of_rank % rows == 0), default=1)
    new = of_rank * ranks, fits * over
    changed = [f"{name}={value}" for name, value, old in zip(names, new, now, strict=True) if value != old]
    same = ", which leaves the update as it is" if new[0] == count else ""
    return f"set {' and '.join(changed)}{same}" + (f"; or start {less} rank{'s' * (less > 1)}" if less else "")


def plan_pieces(train: UpdatesConfig, ranks: int, whose: str) -> MicroBatchPlan:
    """The cut of `train.*` for models whose memory sees all of a micro-batch; see cut_rows."""
    rows, micro = ("train.blocks_per_update", train.blocks_per_update), ("train.micro_blocks", train.micro_blocks)
    return cut_rows(rows, micro, ranks, f": {whose}")


def cut_rows(rows: tuple[str, int], micro: tuple[str, int], ranks: int, whose: str) -> MicroBatchPlan:
    """Micro-batches of `micro` rows over all ranks, each cut into one piece per rank; both are (setting, value).

    Number n of the plan is piece n mod R of micro-batch n // R. `whose`: words of the message.
    Raises UsageError, with the nearest valid values, when rows do not divide.
    """
    (rows_name, count), (micro_name, size) = rows, micro
    advice = mend((rows_name, micro_name), (count, size), ranks, ranks, 0 if count % size else fewer(size, ranks))
    if count % size:
        raise UsageError(f"{micro_name}={size} does not divide {rows_name}={count}; {advice}")
    if size % ranks:
        raise UsageError(
            f"{micro_name}={size}{whose} micro-batch is of all ranks, and {ranks} ranks do not divide it; {advice}"
        )
    return MicroBatchPlan(size // ranks, count // size * ranks, ranks)


def micro_seed(seed: int, update: int, micro: int) -> int:
    """Seed of the random numbers (dropout) of one micro-batch: a hash, so that neighbours are unrelated.

    It names the work and not the rank, so masks do not depend on the rank count and a resumed run needs no state.
    """
    return xxhash.xxh3_64_intdigest(struct.pack("<3q", seed, update, micro)) >> 1
