"""What a search copies to the disks of its nodes where launch.stage_in asks for it: what it reads at random, or often.

Index and values are read at random. Keys are read in order: for a brute-force search by every rank for each unit, so
that every node has all of them; for exact distances once a pass, in ranges of rows, so that a node has the shards of
which its ranks read the first range, and none where there is one pass. A rank of another node reads such a shard where
it lies.
"""

from collections.abc import Sequence

from distlm.data.tokens import TokenFiles
from distlm.errors import UsageError
from distlm.index.layout import IndexFolder
from distlm.index.search.candidates import candidates_of, is_coarse
from distlm.index.state import read_index_record, written_index
from distlm.knnlm.search.neighbours import MANIFEST
from distlm.knnlm.search.rescore import passes, row_ranges
from distlm.knnlm.search.source import open_store
from distlm.runtime.local.copies import Wanted
from distlm.runtime.local.place import asked_place
from distlm.runtime.stage import Stage
from distlm.runtime.units.rounds import first_readers


def wanted_copies(stage: Stage, splits: Sequence[str]) -> list[Wanted]:
    """The files that a search of these splits has copied; none without launch.stage_in, and where all is found.

    Before gigabytes are copied: raises DistlmError when store, model and index do not belong together, UsageError for
    more neighbours than there are keys.
    """
    knn, run = stage.config.knn, stage.run
    pending = [split for split in splits if not (run.kept_neighbours(split) / MANIFEST).exists()]
    if not pending or not asked_place(stage.config.launch.stage_in):
        return []
    store = open_store(stage)
    if knn.k > store.rows:
        raise UsageError(f"knn.k={knn.k}: the datastore has {store.rows} rows; lower knn.k")
    keys = store.written(values=False)
    values = Wanted(store.folder, store.written(keys=False))
    if knn.search == "brute":
        return [values, Wanted(store.folder, keys)]
    index = read_index_record(IndexFolder(run.index), store)
    template = IndexFolder(run.index).template
    found = [values, Wanted(run.index, [file for file in written_index(run.index) if file.path != template])]
    if knn.distances == "exact" or knn.similarity == "dot":
        tokens = TokenFiles.open(run.tokens(stage.config))
        queries = [len(tokens.split(split)) for split in pending]
        asked = candidates_of(knn, store.rows, is_coarse(index.code_size, index.width))
        if passes(queries, asked, store.width) > 1:
            ranges = row_ranges([shard.rows for shard in store.shards])
            owner = first_readers([rows.shard for rows in ranges], stage.comm.size)
            readers = {file.path: owner[number] for number, file in enumerate(keys)}
            found.append(Wanted(store.folder, keys, readers))
    return found
