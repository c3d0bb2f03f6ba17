"""Adds every datastore shard to its own part, with global ids. The unit of work is one shard."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import ceil
from typing import Any, NotRequired, TypedDict

import numpy as np

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.build.encode import Encoder
from distlm.index.build.sample import check_finite
from distlm.index.build.template import Template, load_template
from distlm.index.build.torch_lists import gpu_device
from distlm.index.faiss_module import write_index
from distlm.index.layout import Array, IndexFolder, deserialise
from distlm.index.records import PartRecord
from distlm.index.state import merged_before
from distlm.runtime.files import (
    atomic_path,
    file_hash,
    require_free_disk,
    sweep_temporaries,
)
from distlm.runtime.local.copies import Wanted, copied, read_in_place
from distlm.runtime.local.place import asked_place
from distlm.runtime.lock import only_writer
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.share import Share, share_of
from distlm.runtime.stage import Stage


class AddSummary(TypedDict):
    """What the stage prints: parts and rows that this start added."""

    seconds: float
    parts: int
    rows: int
    done_before: NotRequired[bool]


def run_index_add(stage: Stage) -> AddSummary:
    """Write RUN/index/NAME/parts/part-NNNNN.index for every datastore shard; finished parts are kept.

    With launch.share=K/N this process adds the shards K, K+N, … only, at once with other shares. With launch.stage_in
    each node reads copies of the keys of its shards. Raises DistlmError without a template, for a template of another
    store, a full disk, and NaN or infinite keys.
    """
    start = time.monotonic()
    comm = stage.comm
    share = together(comm, lambda: share_of(stage.config, comm.size))
    datastore = together(comm, lambda: Datastore.open(stage.run.datastore))
    folder = IndexFolder(stage.run.index)
    template = together(comm, lambda: load_template(folder, datastore))
    if rank0_first(comm, lambda: merged_before(folder, datastore, template)):
        say(f"index add: {folder.merged} is complete, nothing to do", comm.rank)
        return {"seconds": 0.0, "parts": 0, "rows": 0, "done_before": True}
    shards = [shard.index for shard in datastore.shards if share is None or share.has(shard.index)]
    with only_writer(folder.root, comm, "adding to this index", share):
        units = rank0_first(comm, lambda: _plan(folder, datastore, template, shards, share))
        finished = len(shards) - len(units)
        whole, rows = (sum(datastore.shards[unit].rows for unit in chosen) for chosen in (shards, units))
        if finished and not units:
            say(f"index add: all {finished} parts are complete, nothing to do", comm.rank)
        elif finished:
            say(f"index add: {finished} of {len(shards)} parts are complete, continuing", comm.rank)
        wanted = rank0_first(comm, lambda: _wanted_copies(stage, datastore, units))
        with copied(stage, "index add", wanted) as copies:
            if units:
                stage.require_whole(datastore.folder, read_in_place(datastore.written(shards=units), wanted))
            store = replace(datastore, copies=copies)
            with Progress("index add", whole, "keys", comm.rank, done=whole - rows) as progress:
                for turn in range(ceil(len(units) / comm.size)):
                    stage.stop.check(comm, "index add")
                    mine = units[turn * comm.size : (turn + 1) * comm.size]
                    together(comm, lambda mine=mine: _add_mine(folder, store, template, mine, comm.rank))  # type: ignore[misc]
                    progress.advance(sum(datastore.shards[unit].rows for unit in mine))
    seconds = time.monotonic() - start
    if comm.rank == 0 and units:
        stage.run.metrics.write("index add", {STAGE_SECONDS: round(seconds, 3), "rows": rows, "parts": len(units)})
    return {"seconds": seconds, "parts": len(units), "rows": rows}


def _wanted_copies(stage: Stage, datastore: Datastore, units: list[int]) -> list[Wanted]:
    """Keys of the shards that are to be added, each for the rank that adds it; none without launch.stage_in."""
    if not asked_place(stage.config.launch.stage_in):
        return []
    keys = datastore.written(shards=units, values=False)
    readers = {file.path: number % stage.comm.size for number, file in enumerate(keys)}
    return [Wanted(datastore.folder, keys, readers)]


def add_shard(datastore: Datastore, shard: int, template: Template) -> Any:
    """A faiss index of this template that holds one shard's keys under their global row numbers.

    Where there is a GPU, lists are found on it. Raises DistlmError for NaN or infinite keys.
    """
    index = deserialise(template.data)
    first = datastore.shards[shard].first_row
    with Encoder(index, device=gpu_device(), keys=datastore.rows) as encoder:
        for start, keys in read_batches(datastore.keys(shard), encoder.batch):
            check_finite(keys, datastore, shard, np.arange(start, start + len(keys)))
            encoder.add(keys, np.arange(first + start, first + start + len(keys), dtype=np.int64))
    return index


def read_batches(keys: Array, batch: int) -> Iterator[tuple[int, Array]]:
    """(first row, keys fp32 [≤ batch, D]) of keys [n, D] in order; the next batch is read while one is used."""

    def read(start: int) -> Array:
        return np.ascontiguousarray(keys[start : start + batch], dtype=np.float32)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0)
        for start in range(0, len(keys), batch):
            current = ahead.result()
            if start + batch < len(keys):
                ahead = reader.submit(read, start + batch)
            yield start, current


def part_record(datastore: Datastore, shard: int, template: Template, size: int, xxh3: str) -> PartRecord:
    """What the sidecar of a part of `size` bytes and that checksum must say."""
    return PartRecord(
        template=template.id,
        datastore=datastore.fingerprint,
        shard=shard,
        first_id=datastore.shards[shard].first_row,
        rows=datastore.shards[shard].rows,
        bytes=size,
        xxh3=xxh3,
    )


def _plan(
    folder: IndexFolder, datastore: Datastore, template: Template, shards: list[int], share: Share | None
) -> list[int]:
    """Those of `shards` without a valid part. Checks the disk first."""
    folder.parts.mkdir(parents=True, exist_ok=True)
    if share is None:
        sweep_temporaries(folder.parts)
    else:
        # The temporary files of other shares may be in use.
        for shard in shards:
            sweep_temporaries(folder.parts, folder.part(shard).name)
            sweep_temporaries(folder.parts, folder.part_json(shard).name)
    units = [shard for shard in shards if not _is_done(folder, datastore, shard, template)]
    key_bytes = template.record.code_size + 8
    needed = sum(datastore.shards[unit].rows * key_bytes + len(template.data) for unit in units)
    require_free_disk(folder.parts, needed, f"{len(units)} index parts")
    return units


def _is_done(folder: IndexFolder, datastore: Datastore, shard: int, template: Template) -> bool:
    if not folder.part_json(shard).exists() or not folder.part(shard).exists():
        return False
    try:
        record = PartRecord.read(folder.part_json(shard))
    except DistlmError:
        return False
    same = record == part_record(datastore, shard, template, record.bytes, record.xxh3)
    return same and folder.part(shard).stat().st_size == record.bytes


def _add_mine(folder: IndexFolder, datastore: Datastore, template: Template, mine: list[int], rank: int) -> None:
    if rank >= len(mine):
        return
    shard = mine[rank]
    index = add_shard(datastore, shard, template)
    path = folder.part(shard)
    # An old sidecar must not vouch for the new part.
    folder.part_json(shard).unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        write_index(index, temporary)
        record = part_record(datastore, shard, template, temporary.stat().st_size, file_hash(temporary))
    record.write(folder.part_json(shard))
