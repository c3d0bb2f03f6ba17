"""A search that several ranks share out by parts: each searches its own, and the nearest of all are kept.

For an index that is larger than the memory of one node: every rank maps its parts only.
"""

from pathlib import Path

import numpy as np

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.build.template import Template, load_template
from distlm.index.layout import Array, IndexFolder
from distlm.index.merge.parts import check_coverage, open_parts
from distlm.index.records import PartRecord
from distlm.index.search.searcher import SearchIndex, Shape, best_of_rows
from distlm.index.state import finished_record
from distlm.runtime.progress import Progress
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import Comm

GATHERED_BYTES = 256 << 20
"""Ids and distances of all ranks that rank 0 holds at once."""


def split_search(
    comm: Comm, folder: Path, datastore: Datastore, queries: Array, k: int, nprobe: int, scan: str = "queries"
) -> tuple[Array, Array] | None:
    """Search `queries` [Q, D] in the parts of all ranks. Collective.

    Returns on rank 0 ids int64 [Q, k] and squared L2 distances fp32 [Q, k], ordered by (distance, id): those of the
    merged index (of keys equally far at the k-th place any may be kept); None on the other ranks. Rank r holds the
    parts r, r + ranks, … and searches them as `scan` says (SearchIndex). Memory on rank 0: GATHERED_BYTES and the
    result. Raises DistlmError for missing, cut or foreign parts, and what SearchIndex.search raises.
    """
    files = IndexFolder(folder)
    template = together(comm, lambda: load_template(files, datastore))
    records = rank0_first(comm, lambda: _parts(files, datastore, template))
    if comm.size > len(records):
        raise DistlmError(f"{files.parts}: {len(records)} parts for {comm.size} ranks; start at most {len(records)}")
    mine = records[comm.rank :: comm.size]

    def open_mine() -> SearchIndex:
        index = open_parts(template, [files.part(record.shard) for record in mine])
        rows = sum(record.rows for record in mine)
        whole = sum(record.rows for record in records)
        shape = Shape(rows, template.record.width, template.record.nlist, merged=False, of_rows=whole)
        return SearchIndex(index, shape, files.parts, scan)

    index = together(comm, open_mine)
    step = max(1, GATHERED_BYTES // (12 * k * comm.size))
    results = []
    with Progress("index search", len(queries), "queries", comm.rank) as progress:
        # Queries of none, too: their width is checked, and the answer is empty.
        for start in range(0, max(1, len(queries)), step):
            block = queries[start : start + step]
            found = comm.gather(together(comm, lambda block=block: index.search(block, k, nprobe)))  # type: ignore[misc]
            if found is not None:
                ids, distances = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
                results.append(best_of_rows(ids, distances, k))
            progress.advance(len(block))
    if comm.rank:
        return None
    ids, distances = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
    return ids, distances


def _parts(files: IndexFolder, datastore: Datastore, template: Template) -> list[PartRecord]:
    """What check_coverage returns. Its mend differs where the index is merged: `distlm index add` adds no part then."""
    if not files.index_json.exists() or not finished_record(files).merged:
        return check_coverage(files, datastore, template)
    mend = (
        f"remove {files.index_json} and run `distlm index build` with index.keep_parts=true, or search on one rank, "
        f"which reads {files.merged.name}"
    )
    return check_coverage(files, datastore, template, mend)
