"""Phase 1 of a search with knn.scan=lists: all ranks look for the neighbours of a batch of units together.

Each rank has lists of its own, of about equal work, which it alone reads: so the share of a rank stays in its node's
memory from batch to batch, where it fits, and is read from the disk once. Queries go to all ranks, what each has found
comes back to the rank whose unit it is. What is kept of each query does not depend on who read which list
(index/search/lists.py), so that the files are the same for any number of ranks.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from distlm.index.layout import Array
from distlm.index.search.lists import Nearest, batch_queries
from distlm.index.search.searcher import Probed, SearchIndex
from distlm.knnlm.search.forward import TokenStates
from distlm.knnlm.search.work import SplitWork
from distlm.runtime.progress import Progress
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.stage import Stage


def search_by_lists(stage: Stage, work: SplitWork, label: str) -> None:
    """Find and write the units that are missing. Collective.

    Memory of a rank: about three times BATCH_BYTES, or what the queries of one unit take where that is more. A search
    that is killed loses the batch that it was at.
    """
    comm, index, knn = stage.comm, work.source.index, work.source.knn
    assert index is not None
    pending = rank0_first(comm, lambda: [unit for unit in range(len(work.units)) if not work.is_found(unit)])
    shared = SharedLists(comm, index, work.candidates, knn.nprobe)
    with Progress(label, len(work.units), "units", comm.rank, done=len(work.units) - len(pending)) as progress:
        for batch in batches(pending, work.unit_tokens, shared.batch):
            stage.stop.check(comm, label)
            mine = batch[comm.rank :: comm.size]
            states = together(comm, lambda mine=mine: list(work.states(mine)))  # type: ignore[misc]
            found = shared.find([np.asarray(of.queries, np.float32) for of in states])

            def write(
                mine: Sequence[int] = mine,
                states: Sequence[TokenStates] = states,
                found: Sequence[tuple[Array, Array]] = found,
            ) -> None:
                for unit, of, (ids, distances) in zip(mine, states, found, strict=True):
                    work.write_found(unit, of, ids, distances)

            together(comm, write)
            progress.advance(len(batch))


class SharedLists:
    """An index whose lists the ranks share: by the work of the first queries, and then always so."""

    def __init__(self, comm: Comm, index: SearchIndex, k: int, nprobe: int) -> None:
        self._comm, self._index, self._k, self._nprobe = comm, index, k, nprobe
        self._share: tuple[int, int] | None = None
        self.batch = batch_queries(index.shape.width, k, min(nprobe, index.nlist))
        """Queries that are looked for at once."""

    def find(self, units: Sequence[Array]) -> list[tuple[Array, Array]]:
        """Ids int64 [q, k] and squared L2 fp32 [q, k], nearest first, of this rank's units of queries fp32 [q, D].

        Collective; a rank may have no unit, but not all of them.
        """
        comm, index, k = self._comm, self._index, self._k
        # Each unit by itself: the last bits of distances to centroids may depend on a query's place in a block.
        mine = together(comm, lambda: [index.probed(unit, self._nprobe) for unit in units])
        everyone, edges = _probed_by_all(comm, mine)
        if self._share is None:
            self._share = shares(everyone.lists, index.list_sizes, comm.size)[comm.rank]
        found = together(comm, lambda: index.scan_lists(everyone, k, self._share))
        parts = comm.alltoall([found.packed[low:high] for low, high in pairwise(edges)])
        ids, distances = Nearest.of_shares(parts).found()
        stops = np.cumsum([len(unit) for unit in units]).tolist()
        return [(ids[low:high], distances[low:high]) for low, high in pairwise([0, *stops])]


def batches(units: Sequence[int], tokens: Sequence[int], most: int) -> Iterator[list[int]]:
    """Consecutive units of at most `most` queries together, at least one each; tokens: of every unit there is."""
    batch: list[int] = []
    for unit in units:
        if batch and sum(tokens[one] for one in batch) + tokens[unit] > most:
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


def shares(lists: Array, sizes: Array, ranks: int) -> list[tuple[int, int]]:
    """Lists [low, high) of each rank, of about equal work for queries that probe `lists` int64 [n, P]; sizes int64
    [nlist]: keys of each list."""
    probes = np.bincount(lists[lists >= 0].ravel(), minlength=len(sizes))
    # A list that no query of these probes is read for a later one, perhaps.
    work = np.cumsum(sizes * (probes + 1))
    inner = np.searchsorted(work, work[-1] * np.arange(1, ranks) / ranks, side="right")
    return list(pairwise([0, *inner.tolist(), len(sizes)]))


def _probed_by_all(comm: Comm, mine: list[Probed]) -> tuple[Probed, list[int]]:
    """The queries of all ranks in rank order, and where those of each rank begin and end. Collective."""
    every = comm.allgather(mine)
    units = [unit for of in every for unit in of]
    counts = [sum(len(unit.lists) for unit in of) for of in every]
    fields = ("vectors", "lists", "to_centroids")
    whole = Probed(*(np.concatenate([getattr(unit, name) for unit in units]) for name in fields))
    return whole, [0, *np.cumsum(counts).tolist()]
