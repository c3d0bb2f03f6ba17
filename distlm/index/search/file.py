"""`distlm index search`: neighbours of query vectors in a file."""

import time
from pathlib import Path

import numpy as np

from distlm.config.schema import KnnConfig, RunConfig
from distlm.datastore.reader import Datastore
from distlm.errors import UsageError
from distlm.index.build.template import Template, load_template
from distlm.index.layout import Array, IndexFolder
from distlm.index.pairs import stored_values
from distlm.index.records import TemplateRecord
from distlm.index.search.candidates import candidates_of, is_coarse, refuse_too_many
from distlm.index.search.searcher import brute_search, exactly_ordered, open_index
from distlm.index.search.split import split_search
from distlm.index.state import written_index, written_parts
from distlm.index.vectors import open_vectors
from distlm.runtime.checked import require_whole
from distlm.runtime.files import atomic_path
from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.rundir import RunDir


def refuse_vain(knn: KnnConfig, rows: int, candidates: int, nlist: int | None, verb: str, rank: int) -> None:
    """Say what is asked in vain of a store of `rows` keys, and, for `candidates` neighbours, of an index of `nlist`
    lists (None: no index).

    Raises UsageError for more neighbours than there are keys, and for more than a GPU finds where one is to search.
    """
    if knn.k > rows:
        raise UsageError(f"knn.k={knn.k}: the datastore has {rows} rows; lower knn.k")
    if nlist is not None:
        refuse_too_many(knn, candidates, nlist)
    if nlist is not None and knn.nprobe > nlist:
        say(f"{verb}: knn.nprobe={knn.nprobe} is more than the index's {nlist} lists: all are searched", rank)


def _refuse_vain(config: RunConfig, datastore: Datastore, comm: Comm) -> None:
    path = IndexFolder(RunDir.of(config).index).template_json
    # Without one there is no index, which is said where it is opened.
    template = TemplateRecord.read(path) if config.knn.search == "index" and path.exists() else None
    lists = None if template is None else template.nlist
    refuse_vain(config.knn, datastore.rows, _asked(config.knn, datastore, template), lists, "index search", comm.rank)


def _asked(knn: KnnConfig, datastore: Datastore, template: TemplateRecord | None) -> int:
    """Neighbours that the index is asked for."""
    return candidates_of(knn, datastore.rows, template is not None and is_coarse(template.code_size, template.width))


def _require_whole(config: RunConfig, comm: Comm, datastore: Datastore, template: Template | None) -> None:
    """Compare what is read with its checksums: the store, and with a `template` the index. Collective."""
    if not config.launch.verify:
        return
    reads_keys = template is None or config.knn.distances == "exact"
    require_whole(comm, datastore.folder, datastore.written(keys=reads_keys), "index search")
    if template is not None:
        folder = IndexFolder(RunDir.of(config).index)
        files = rank0_first(
            comm, lambda: written_index(folder.root) if comm.size == 1 else written_parts(folder, template.id)
        )
        require_whole(comm, folder.root, files, "index search")


def search_file(config: RunConfig, comm: Comm, queries: Path, out: Path) -> dict[str, int | float | str] | None:
    """Search `queries` (.npy [Q, D] float16 or float32) and write `out` (.npz: ids, distances, values, each [Q, k]).

    k, candidates, nprobe, search and distances come from the knn section. Values of id −1 are −1. Collective: on
    several ranks each searches its parts of the index. Returns a summary on rank 0, None elsewhere. Raises DistlmError
    for a file that is no .npy of that shape, for an unfinished or foreign index and for files of store or index that
    are not as they were written, UsageError for more neighbours than keys.
    """
    start = time.monotonic()
    vectors = together(comm, lambda: open_vectors(queries))
    run, knn = RunDir.of(config), config.knn
    datastore = together(comm, lambda: Datastore.open(run.datastore))
    if knn.search == "brute" and comm.size > 1:
        raise UsageError("knn.search=brute compares with every key in one process; start it on one rank")
    found: tuple[Array, Array] | None
    together(comm, lambda: _refuse_vain(config, datastore, comm))
    if knn.search == "brute":
        _require_whole(config, comm, datastore, None)
        found = brute_search(datastore, vectors, knn.k)
    else:
        template = together(comm, lambda: load_template(IndexFolder(run.index), datastore))
        _require_whole(config, comm, datastore, template)
        asked = _asked(knn, datastore, template.record)
        if comm.size > 1:
            found = split_search(comm, run.index, datastore, vectors, asked, knn.nprobe, knn.scan)
        else:
            found = open_index(run.index, datastore, knn.scan).search(vectors, asked, knn.nprobe)
    if found is None:
        return None
    ids, distances = found
    if knn.search == "index" and knn.distances == "exact":
        ids, distances = exactly_ordered(datastore, vectors, ids, knn.k)
    with atomic_path(out) as temporary, temporary.open("wb") as stream:
        np.savez(stream, ids=ids, distances=distances, values=stored_values(datastore, ids))
    return {
        "queries": len(vectors),
        "k": knn.k,
        "unfilled": int((ids < 0).sum()),
        "seconds": time.monotonic() - start,
        "out": str(out),
    }
