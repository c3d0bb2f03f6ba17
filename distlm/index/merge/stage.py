"""Merges the parts of a datastore's index into one stock faiss file, byte for byte what one process would have written.

A merge that was cut short goes on with the units that are missing, on any number of ranks; a half-written file is never
taken for a whole.
"""

import time
from typing import NotRequired, TypedDict

import numpy as np

from distlm.datastore.reader import Datastore
from distlm.index.build.template import Template, load_template
from distlm.index.faiss_module import require_faiss
from distlm.index.layout import Array, Header, IndexFolder, lists_header
from distlm.index.merge.check import SumCheck
from distlm.index.merge.copy import MergeLayout
from distlm.index.merge.parts import check_coverage, check_part, open_parts, part_mend, part_sizes, remove_parts
from distlm.index.merge.write import UNIT_BYTES, write_merged
from distlm.index.records import IndexRecord, PartRecord
from distlm.index.selfcheck import check_index, open_mapped
from distlm.index.state import merged_before
from distlm.runtime.files import format_bytes, json_hash, sync_folder
from distlm.runtime.lock import only_writer
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.stage import Stage


class MergeSummary(TypedDict):
    """What the stage prints."""

    seconds: float
    rows: int
    bytes: int
    self_found: NotRequired[float]
    """As in index.json."""
    done_before: NotRequired[bool]


def run_index_merge(stage: Stage) -> MergeSummary:
    """Write RUN/index/NAME/merged.index and index.json from the parts.

    With index.merge=false the parts are checked alike and stay where they lie: only index.json is written.
    Raises DistlmError for missing, cut, damaged or foreign parts, a full disk, a result that does not find the store's
    own keys, and while another run writes this index.
    """
    comm = stage.comm
    datastore = together(comm, lambda: Datastore.open(stage.run.datastore))
    folder = IndexFolder(stage.run.index)
    template = together(comm, lambda: load_template(folder, datastore))
    # First without the lock: a finished folder may be read-only.
    if done := _nothing_to_do(stage, folder, datastore, template):
        return done
    with only_writer(folder.root, comm, "merging this index"):
        # The run that held the lock until now may have merged it, and removed the parts.
        return _nothing_to_do(stage, folder, datastore, template) or _merge(stage, folder, datastore, template)


def _nothing_to_do(stage: Stage, folder: IndexFolder, datastore: Datastore, template: Template) -> MergeSummary | None:
    """What run_index_merge returns for a finished index; None when it is not finished. Collective."""
    comm = stage.comm
    before = rank0_first(comm, lambda: merged_before(folder, datastore, template))
    if not before or (stage.config.index.merge and not before.merged):
        return None
    say(f"index merge: {folder.merged if before.merged else folder.parts} is complete, nothing to do", comm.rank)
    if before.merged:
        rank0_first(comm, lambda: None if stage.config.index.keep_parts else remove_parts(folder))
    return {"seconds": 0.0, "rows": before.rows, "bytes": before.bytes, "done_before": True}


def _merge(stage: Stage, folder: IndexFolder, datastore: Datastore, template: Template) -> MergeSummary:
    """The work of run_index_merge. Collective; by the only writer."""
    start, comm, merge = time.monotonic(), stage.comm, stage.config.index.merge
    records = rank0_first(comm, lambda: check_coverage(folder, datastore, template))
    layout = _layout(stage, folder, records, template)
    contents = json_hash([record.xxh3 for record in records])
    if merge:
        rank0_first(comm, lambda: _prepare(folder, layout))
        sums = [record.lists for record in records if isinstance(record.lists, str)]
        check = SumCheck(sums, [part_mend(folder, record) for record in records]) if len(sums) == len(records) else None
        digest = write_merged(comm, stage.stop, layout, folder.merging, UNIT_BYTES, check)
    else:
        digest = contents
    record = rank0_first(comm, lambda: _finish(stage, folder, datastore, template, layout, contents, digest))
    seconds = time.monotonic() - start
    if comm.rank == 0:
        if merge and not stage.config.index.keep_parts:
            remove_parts(folder)
        stage.run.metrics.write(
            "index merge",
            {STAGE_SECONDS: round(seconds, 3), "bytes": record.bytes, "self_found": record.self_found},
        )
    return {
        "seconds": seconds,
        "rows": record.rows,
        "bytes": record.bytes,
        "self_found": record.self_found,
    }


def _layout(stage: Stage, folder: IndexFolder, records: list[PartRecord], template: Template) -> MergeLayout:
    """Check every part (each rank its share) and lay out the merged file. Collective.

    Parts are read whole for it where that is not done while they are copied: they stay where they lie, or one has no
    checksums of its lists.
    """
    comm, header = stage.comm, template.header
    later = stage.config.index.merge and all(isinstance(record.lists, str) for record in records)
    mine: dict[int, Array] = {}
    with Progress("index merge: check parts", len(records), "parts", comm.rank) as progress:
        for first in range(0, len(records), comm.size):
            stage.stop.check(comm, "index merge")
            unit = first + comm.rank

            def check(due: list[PartRecord] = records[unit : unit + 1]) -> list[Array]:
                return [(part_sizes if later else check_part)(folder, record, header) for record in due]

            for row in together(comm, check):
                mine[unit] = row
            progress.advance(min(comm.size, len(records) - first))
    every = {unit: row for share in comm.allgather(mine) for unit, row in share.items()}
    return make_layout(folder, header, records, [every[unit] for unit in range(len(records))])


def make_layout(folder: IndexFolder, header: Header, records: list[PartRecord], sizes: list[Array]) -> MergeLayout:
    """The merged file of parts whose sidecars and list sizes int64 [nlist] are given in shard order."""
    return MergeLayout(
        header=header.bytes(sum(record.rows for record in records)),
        part_headers=tuple(
            len(header.bytes(record.rows)) + len(lists_header(row, header.code_size))
            for record, row in zip(records, sizes, strict=True)
        ),
        paths=tuple(folder.part(record.shard) for record in records),
        sizes=np.stack(sizes),
        code_size=header.code_size,
    )


def _prepare(folder: IndexFolder, layout: MergeLayout) -> None:
    folder.merged.unlink(missing_ok=True)
    say(f"index merge: {len(layout.paths)} parts, {format_bytes(layout.bytes)}")


def _finish(
    stage: Stage, folder: IndexFolder, datastore: Datastore, template: Template, layout: MergeLayout, contents: str,
    digest: str,
) -> IndexRecord:  # fmt: skip
    """Check the merged file, or the parts, against the store, and write index.json last.

    contents: hash of the parts' checksums; digest: of the file, or the same.
    """
    merge = stage.config.index.merge
    faiss = require_faiss()
    if merge:
        index = open_mapped(folder.merging, faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    else:
        index = open_parts(template, layout.paths)
    path = folder.merging if merge else folder.parts
    found = check_index(index, path, datastore, stage.config.index.seed)
    if found < 0.5:
        say(
            f"index merge: only {100 * found:.0f} % of sampled keys find themselves among 64 neighbours of their list: "
            f"{template.record.factory} is coarse for this store; more bytes per key (PQ…, SQ8) keep more"
        )
    if merge:
        folder.merging.replace(folder.merged)
        sync_folder(folder.root)
    record = IndexRecord(
        # Parts give the neighbours that the merged file gives: what was found in either belongs to the other, too.
        fingerprint=json_hash([datastore.fingerprint, template.id, contents]),
        datastore=datastore.fingerprint,
        template=template.id,
        factory=template.record.factory,
        metric="L2",
        width=template.record.width,
        nlist=template.record.nlist,
        code_size=layout.code_size,
        rows=datastore.rows,
        parts=len(layout.paths),
        merged=merge,
        bytes=layout.bytes if merge else sum(part.stat().st_size for part in layout.paths),
        xxh3=digest,
        self_found=found,
    )
    record.write(folder.index_json)
    return record
