"""Units of an unfinished store: which are written, writing more, and making whole shards of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distlm.datastore.manifest import planned_shard, sidecar_path, store_bytes
from distlm.datastore.plan import ShardPlan, StorePlan, Unit, following
from distlm.datastore.records import Shard
from distlm.datastore.settings import Settings
from distlm.datastore.shard_writer import ShardWriter, Streak
from distlm.datastore.unfinished.files import (
    Done,
    begin,
    files_have_room,
    kept_shard,
    read_back,
    read_units,
    seal,
    write_units,
)
from distlm.runtime.files import format_bytes, require_free_disk
from distlm.runtime.progress import say
from distlm.runtime.ranks.share import Share

LABEL = "datastore write"

Fill = Callable[[ShardWriter, ShardPlan, int, int, Callable[[int], None]], None]
"""(writer, shard, first, rows, advance): puts the rows [first, first + rows) of a shard into the writer, and tells
`advance` the rows of each batch."""


@dataclass(frozen=True)
class StoreJob:
    """What every rank knows before the work starts."""

    folder: Path
    checkpoint: Path
    ids: npt.NDArray[np.int32]
    plan: StorePlan
    settings: Settings


@dataclass
class Kept:
    """What is there of an unfinished store, or was just written of it."""

    whole: dict[int, Shard] = field(default_factory=dict)
    """Whole shards by number."""
    done: Done = field(default_factory=dict)
    """Written units of the others."""
    unit_rows: int = 0
    """Rows of a unit."""

    def add(self, other: "Kept") -> None:
        """What another start or rank has done, too."""
        self.whole |= other.whole
        self.done |= other.done

    def left(self, plan: StorePlan, shards: Sequence[ShardPlan]) -> list[Unit]:
        """Units of these shards that are not written."""
        return [
            unit for shard in shards if shard.index not in self.whole for unit in plan.units(shard, self.unit_rows)
            if unit.key not in self.done
        ]  # fmt: skip


def keep(job: StoreJob, share: Share | None, shards: Sequence[ShardPlan]) -> Kept:
    """What is on disk of `shards`: whole ones, as their sidecars say, and units; the disk must hold the others."""
    folder, settings = job.folder, job.settings
    found = [kept_shard(folder, settings, planned_shard(shard)) for shard in shards]
    kept = Kept({shard.index: shard for shard in found if shard is not None})
    recorded, done = read_units(folder, settings, share)
    kept.unit_rows = recorded or job.plan.unit_rows
    parts = [shard for shard in shards if shard.index not in kept.whole]
    for shard in parts:
        # An old sidecar must not vouch for a file that is being replaced.
        sidecar_path(folder, shard.index).unlink(missing_ok=True)
        units = [unit for unit in job.plan.units(shard, kept.unit_rows) if unit.key in done]
        if units and files_have_room(folder, settings, planned_shard(shard), units):
            kept.done |= {unit.key: done[unit.key] for unit in units}
        else:
            begin(folder, settings, planned_shard(shard))
    record(job, share, kept)
    left = kept.left(job.plan, shards)
    rows, rows_left = sum(shard.rows for shard in shards), sum(unit.rows for unit in left)
    needed = (
        store_bytes(settings, [planned_shard(shard) for shard in parts])
        * rows_left
        // max(1, sum(shard.rows for shard in parts))
    )
    require_free_disk(folder, needed, f"datastore ({len(parts)} of {len(shards)} shards)")
    if kept.whole or kept.done:
        say(
            f"{LABEL}: {len(kept.whole)} of {len(shards)} shards are complete, and {len(kept.done)} units of others; "
            "continuing"
        )
    say(
        f"{LABEL}: {rows} rows x {settings.width} {settings.key_dtype}, {len(parts)} shards to write "
        f"({format_bytes(needed)}) in {len(left)} units of work; keys are {settings.tap}; {settings.rule}"
    )
    return kept


def write_run(job: StoreJob, put: Fill, streak: Streak, advance: Callable[[int], None], units: Sequence[Unit]) -> Kept:
    """Write units in order on this rank; shards that it has written all of are whole then."""
    new = Kept()
    for run in following(units):
        shard, first = job.plan.shards[run[0].shard], run[0].first
        with ShardWriter(job.folder, job.settings, planned_shard(shard), run, streak) as writer:
            put(writer, shard, first, run[-1].first + run[-1].rows - first, advance)
        new.done |= writer.done
        if writer.finished is not None:
            seal(job.folder, job.settings, writer.finished)
            new.whole[shard.index] = writer.finished
    return new


def sealed(job: StoreJob, kept: Kept, shard: ShardPlan) -> Kept:
    units = job.plan.units(shard, kept.unit_rows)
    whole = read_back(job.folder, job.settings, planned_shard(shard), units, kept.done)
    seal(job.folder, job.settings, whole)
    return Kept({shard.index: whole})


def record(job: StoreJob, share: Share | None, kept: Kept) -> None:
    """Keep which units are written of shards that are not whole."""
    done = {key: hashes for key, hashes in kept.done.items() if int(key.split("/")[0]) not in kept.whole}
    write_units(job.folder, job.settings, share, kept.unit_rows, done)
