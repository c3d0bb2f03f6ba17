"""Adds every datastore shard to its own part, with global ids.

The unit of work is some blocks of keys (codes.py): ranks encode the units of a shard together, one puts the part
together.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from msgspec import UNSET, UnsetType

from distlm.datastore.plan import Unit, following
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.build.codes import CodeFiles, encoded, unit_rows
from distlm.index.build.encode import Encoder
from distlm.index.build.integer_lists import TRIAL
from distlm.index.build.sample import check_finite
from distlm.index.build.template import Template, load_template
from distlm.index.build.torch_lists import gpu_device
from distlm.index.faiss_module import write_index
from distlm.index.layout import Array, IndexFolder, deserialise, list_sums
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
from distlm.runtime.units.rounds import first_readers, rounds, say_idle


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
    if complete := rank0_first(comm, lambda: _complete(folder, datastore, template)):
        say(f"index add: {complete} is complete, nothing to do", comm.rank)
        return {"seconds": 0.0, "parts": 0, "rows": 0, "done_before": True}
    shards = [shard.index for shard in datastore.shards if share is None or share.has(shard.index)]
    with only_writer(folder.root, comm, "adding to this index", share), ExitStack() as open_:
        adding = together(comm, lambda: open_.enter_context(Adding(folder, datastore, template, share)))
        parts, done = rank0_first(comm, lambda: _plan(adding, shards, comm.size))
        adding.done = done
        units = adding.left(parts)
        finished, rows = len(shards) - len(parts), sum(unit.rows for unit in units)
        if finished and not parts:
            say(f"index add: all {finished} parts are complete, nothing to do", comm.rank)
        elif finished:
            say(f"index add: {finished} of {len(shards)} parts are complete, continuing", comm.rank)
        say_idle(comm, "index add", len(units), f"launch.ranks={len(units)} takes as long")
        wanted = rank0_first(comm, lambda: _wanted_copies(stage, datastore, units))
        with copied(stage, "index add", wanted) as copies:
            if units:
                read = sorted({unit.shard for unit in units})
                stage.require_whole(datastore.folder, read_in_place(datastore.written(shards=read), wanted))
            adding.store = replace(datastore, copies=copies)
            _encode(stage, adding, units, sum(datastore.shards[shard].rows for shard in shards))
            # Shards whose units were encoded by several ranks or in several starts.
            left = [shard for shard in parts if shard not in adding.added]
            for _ in rounds(stage, "index add", left, adding.put_all_together):
                pass
        if share is None:
            rank0_first(comm, adding.files.clear)
        else:
            rank0_first(comm, lambda: adding.files.record.unlink(missing_ok=True))
    seconds = time.monotonic() - start
    if comm.rank == 0 and parts:
        stage.run.metrics.write("index add", {STAGE_SECONDS: round(seconds, 3), "rows": rows, "parts": len(parts)})
    return {"seconds": seconds, "parts": len(parts), "rows": rows}


class Adding:
    """Encoding units and putting parts together, on one rank. Use in a `with` block."""

    def __init__(self, folder: IndexFolder, store: Datastore, template: Template, share: Share | None) -> None:
        self.folder, self.store, self.template = folder, store, template
        self.done: dict[str, str] = {}
        """Encoded units of all ranks."""
        self.added: set[int] = set()
        """Shards whose parts were put together by this start, on any rank."""
        self._encoder = settled(Encoder(deserialise(template.data), device=gpu_device(), keys=store.rows), store)
        self.at_once = self._encoder.batch // self._encoder.block
        """Units that keep the threads busy."""
        self.files = CodeFiles(
            folder, part_record(store, 0, template, 0, ""), share, unit_rows(self._encoder.block, store.rows),
            self._encoder.row_bytes,
        )  # fmt: skip

    def __enter__(self) -> "Adding":
        self._encoder.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._encoder.__exit__(*error)

    def left(self, shards: Sequence[int]) -> list[Unit]:
        """Units of shards that are not encoded."""
        return [u for shard in shards for u in self.files.units(self.store, shard) if u.key not in self.done]

    def run(self, advance: Callable[[int], None], units: Sequence[Unit]) -> tuple[dict[str, str], list[int]]:
        """Encode units in order; the part of a shard that is whole then is put together. Returns the checksums of
        units, and these shards."""
        new: dict[str, str] = {}
        added = []
        for run in following(units):
            shard, first, last = run[0].shard, run[0].first, run[-1].first + run[-1].rows

            def before(start: int, keys: Array, shard: int = shard, first: int = first) -> None:
                rows = np.arange(first + start, first + start + len(keys))
                check_finite(keys, self.store, shard, rows)
                advance(len(keys))

            batches = read_batches(self.store.keys(shard)[first:last], self._encoder.batch)
            new |= self.files.write(shard, run, encoded(self._encoder, batches, before))
            # No other rank knows of these units yet, so this rank puts the shard together.
            mine = self.done | new
            if all(unit.key in mine for unit in self.files.units(self.store, shard)):
                self.put_together(shard, mine)
                added.append(shard)
        return new, added

    def put_together(self, shard: int, done: dict[str, str] | None = None) -> None:
        """Write the part of a shard whose units are all encoded, its sidecar last."""
        index = self.files.assemble(self.store, shard, self.template, self.done if done is None else done)
        path, sidecar = self.folder.part(shard), self.folder.part_json(shard)
        # An old sidecar must not vouch for the new part.
        sidecar.unlink(missing_ok=True)
        with atomic_path(path) as temporary:
            write_index(index, temporary)
            size, lists = temporary.stat().st_size, list_sums(index)
            record = part_record(self.store, shard, self.template, size, file_hash(temporary), lists)
        record.write(sidecar)
        self.files.forget(shard)

    def put_all_together(self, shards: Sequence[int]) -> None:
        """As put_together, one after the other."""
        for shard in shards:
            self.put_together(shard)

    def record(self) -> None:
        """Keep which units are encoded of shards that are no parts yet."""
        self.files.save({key: value for key, value in self.done.items() if int(key.split("/")[0]) not in self.added})


def _encode(stage: Stage, adding: Adding, units: list[Unit], whole: int) -> None:
    """Encode the units over the ranks, of `whole` rows with those that are done. Collective."""
    comm, rows_of = stage.comm, {unit.key: unit.rows for unit in units}
    done = whole - sum(rows_of.values())
    with Progress("index add", whole, "keys", comm.rank, done=done) as progress:

        def advance(rows: int) -> None:
            # Rank 0 counts for its peers too, which are as far as it is; the end of a round is exact.
            progress.advance(min(rows * min(comm.size, len(units)), whole - progress.done))

        for found in rounds(stage, "index add", units, partial(adding.run, advance), adding.at_once):
            for new, added in found:
                adding.done |= new
                adding.added |= set(added)
                done += sum(rows_of[key] for key in new)
            rank0_first(comm, adding.record)
            if progress.done < done:
                progress.advance(done - progress.done)


def _wanted_copies(stage: Stage, datastore: Datastore, units: list[Unit]) -> list[Wanted]:
    """Keys of the shards that are to be added, each for the rank that encodes its first unit; none without
    launch.stage_in. The few other ranks that have units of a shard read it where it lies."""
    if not asked_place(stage.config.launch.stage_in):
        return []
    owner = first_readers([unit.shard for unit in units], stage.comm.size)
    keys = datastore.written(shards=list(owner), values=False)
    return [Wanted(datastore.folder, keys, dict(zip((file.path for file in keys), owner.values(), strict=True)))]


def settled(encoder: Encoder, datastore: Datastore) -> Encoder:
    """`encoder`, which finds lists in the way that the store's first keys suit, whatever part of it it is given."""
    if datastore.rows:
        encoder.settle(np.ascontiguousarray(datastore.keys(0)[:TRIAL], dtype=np.float32))
    return encoder


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


def part_record(
    datastore: Datastore, shard: int, template: Template, size: int, xxh3: str, lists: str | UnsetType = UNSET
) -> PartRecord:
    """What the sidecar of a part of `size` bytes and these checksums must say."""
    return PartRecord(
        template=template.id,
        datastore=datastore.fingerprint,
        shard=shard,
        first_id=datastore.shards[shard].first_row,
        rows=datastore.shards[shard].rows,
        bytes=size,
        xxh3=xxh3,
        lists=lists,
    )


def _complete(folder: IndexFolder, datastore: Datastore, template: Template) -> Path | None:
    """The merged file, or the folder of all parts, of a finished index; None where parts are to be added.

    An index that is searched in its parts may have lost some since, which nothing but adding them brings back.
    """
    record = merged_before(folder, datastore, template)
    if record is None:
        return None
    if record.merged:
        return folder.merged
    return folder.parts if all(_is_done(folder, datastore, s.index, template) for s in datastore.shards) else None


def _plan(adding: Adding, shards: list[int], ranks: int) -> tuple[list[int], dict[str, str]]:
    """Those of `shards` without a valid part, and what is encoded of them. Checks the disk first. On rank 0."""
    folder, datastore, files = adding.folder, adding.store, adding.files
    folder.parts.mkdir(parents=True, exist_ok=True)
    if files.share is None:
        sweep_temporaries(folder.parts)
    else:
        # The temporary files of other shares may be in use.
        for shard in shards:
            sweep_temporaries(folder.parts, folder.part(shard).name)
            sweep_temporaries(folder.parts, folder.part_json(shard).name)
    parts = [shard for shard in shards if not _is_done(folder, datastore, shard, adding.template)]
    recorded, done = files.load(), dict[str, str]()
    for shard in shards:
        units = [unit for unit in files.units(datastore, shard) if unit.key in recorded]
        if shard not in parts:
            files.forget(shard)
        elif units and files.has_room(shard, units):
            done |= {unit.key: recorded[unit.key] for unit in units}
        else:
            files.begin(shard)
    for shard in parts:
        # A file that nothing vouches for needs no room beside the new one.
        folder.part_json(shard).unlink(missing_ok=True)
        folder.part(shard).unlink(missing_ok=True)
    if parts:
        # It vouches for the parts that were there.
        folder.index_json.unlink(missing_ok=True)
    files.save(done)
    key_bytes = adding.template.record.code_size + 8
    # A shard's codes are removed once its part is written: a rank keeps those of its shard and of the one before.
    most = sorted((datastore.shards[shard].rows for shard in parts), reverse=True)[: 2 * ranks]
    needed = sum(datastore.shards[shard].rows * key_bytes + len(adding.template.data) for shard in parts)
    encoded = sum(unit.rows for shard in parts for unit in files.units(datastore, shard) if unit.key in done)
    needed += max(0, sum(most) - encoded) * files.row_bytes
    require_free_disk(folder.parts, needed, f"{len(parts)} index parts")
    return parts, done


def _is_done(folder: IndexFolder, datastore: Datastore, shard: int, template: Template) -> bool:
    if not folder.part_json(shard).exists() or not folder.part(shard).exists():
        return False
    try:
        record = PartRecord.read(folder.part_json(shard))
    except DistlmError:
        return False
    same = record == part_record(datastore, shard, template, record.bytes, record.xxh3, record.lists)
    return same and folder.part(shard).stat().st_size == record.bytes
