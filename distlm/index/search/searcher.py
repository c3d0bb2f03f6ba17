"""Searches an index, and the store itself where that is small enough."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.build.blocks import padded
from distlm.index.build.encode import BLOCK as ENCODED_BLOCK
from distlm.index.build.encode import Encoder, one_thread_workers, transforms_of
from distlm.index.build.template import load_template
from distlm.index.factory import inverted_file
from distlm.index.faiss_module import rank_threads, require_faiss
from distlm.index.keys import gather_keys
from distlm.index.layout import Array, IndexFolder
from distlm.index.merge.parts import open_parts
from distlm.index.records import IndexRecord
from distlm.index.search.candidates import is_coarse
from distlm.index.search.fastscan import can_pack, pack
from distlm.index.search.gpu import COMPARED, GpuLists, check_agreement
from distlm.index.search.lists import Nearest, batch_queries, scan_by_list
from distlm.index.selfcheck import open_mapped
from distlm.index.state import read_index_record

QUERY_BLOCK = 1024
"""Queries of one matrix product with the centroids, on one thread: results are the same for any number of threads.
Measured three times as fast as blocks of 256."""
SCAN_BLOCK = 64
"""Queries of one scan of lists on one thread. FastScan makes a table of nprobe × M × 64 bytes for each of them."""
GPU_BATCH = 8192
"""Queries of one search on a GPU."""
BRUTE_CHUNK_BYTES = 128 << 20
"""Keys, as fp32, compared at once by brute_search."""
BRUTE_SPARE = 16
"""Neighbours beyond k that brute_search keeps until distances are exact."""


@dataclass(frozen=True)
class Probed:
    """Queries and the lists that they probe."""

    vectors: Array
    """fp32 [Q, d], behind the index's transforms."""
    lists: Array
    """int64 [Q, P]."""
    to_centroids: Array
    """Squared L2 fp32 [Q, P]."""


@dataclass(frozen=True)
class Shape:
    """What an index must hold."""

    rows: int
    """N, keys."""
    width: int
    """D, numbers of a key."""
    nlist: int
    """Inverted lists."""
    merged: bool = True
    """It is one file, or in memory; false: parts side by side."""
    of_rows: int = 0
    """Keys of the whole index, where this is a rank's share of it; 0: this is the whole."""


class SearchIndex:
    """A finished index, memory-mapped. Distances are squared L2 to the keys as the index encodes them.

    A 4-bit product quantiser is repacked into this process's memory (fastscan.py beside this file); its distances
    carry the rounding of 8-bit look-up tables.
    """

    def __init__(
        self, index: Any, shape: Shape, path: Path, scan: str = "queries", record: IndexRecord | None = None
    ) -> None:
        """index: of faiss, opened from `path`; record: its index.json, where it has one. scan: knn.scan; it is
        repacked for `queries` alone. Raises DistlmError when index and shape do not agree, and for scan=gpu where that
        cannot be."""
        self._index = index
        self._inner = inverted_file(self._index)
        packed = pack(self._inner, shape.of_rows or shape.rows, not shape.merged) if scan == "queries" else None
        self._scanned = packed or self._inner
        self._by_list = scan == "lists"
        self._gpu = GpuLists(self._inner) if scan == "gpu" else None
        self._agreed: set[tuple[int, int]] = set()
        self._transforms = transforms_of(self._index)
        self._pool = one_thread_workers(rank_threads())
        self.shape, self.record = shape, record
        if (self._index.ntotal, self._index.d, self._inner.nlist) != (shape.rows, shape.width, shape.nlist):
            raise DistlmError(
                f"{path}: holds {self._index.ntotal} keys of width {self._index.d} in {self._inner.nlist} lists, "
                f"index.json says {shape.rows}, {shape.width}, {shape.nlist}; build it again"
            )

    @property
    def fingerprint(self) -> str:
        """Hash of the store, the template and the file's bytes; empty without a record."""
        return self.record.fingerprint if self.record else ""

    @property
    def rows(self) -> int:
        """N, keys in the index."""
        return self.shape.rows

    @property
    def bytes(self) -> int:
        """Size on disk; 0 without a record."""
        return self.record.bytes if self.record else 0

    @property
    def nlist(self) -> int:
        """Inverted lists."""
        return self.shape.nlist

    @property
    def coarse(self) -> bool:
        """Whether its codes are so coarse that exact distances should choose among more than k."""
        return is_coarse(int(self._inner.code_size), self.shape.width)

    @property
    def nprobe(self) -> int:
        """Lists searched per query, as faiss has it now."""
        return int(self._scanned.nprobe)

    @property
    def fast_scan(self) -> bool:
        """Whether it is a 4-bit index repacked in memory."""
        return self._scanned is not self._inner

    @property
    def rounded(self) -> bool | None:
        """Of 4-bit product codes whether they are compared by tables of 8 bits, which finds slightly other neighbours;
        None for other codes, which any scan compares alike."""
        return self.fast_scan if can_pack(self._inner) else None

    def set_nprobe(self, nprobe: int) -> int:
        """Search `nprobe` lists per query (at most all); the number faiss reports afterwards.

        Set on the inverted file itself: on a PCA or OPQ wrapper it would not reach the search.
        """
        if nprobe < 1:
            raise DistlmError(f"knn.nprobe={nprobe}: must be at least 1")
        wanted = min(nprobe, self.nlist)
        self._scanned.nprobe = wanted
        if self.nprobe != wanted:
            raise DistlmError(f"knn.nprobe={nprobe}: faiss reports {self.nprobe} after it was set; another faiss?")
        return wanted

    def search(self, queries: Array, k: int, nprobe: int) -> tuple[Array, Array]:
        """Ids int64 [Q, k] and squared L2 distances fp32 [Q, k], nearest first, of `queries` [Q, D].

        Where the searched lists hold fewer than k keys the rest is id −1 at distance inf. The same for any number of
        threads; of keys equally far at the k-th place any may be kept. Raises DistlmError for a wrong width, NaN or
        infinite queries, k or nprobe below 1.
        """
        queries = check_queries(queries, self.shape.width, k)
        probes = self.set_nprobe(nprobe)
        ids = np.empty((len(queries), k), np.int64)
        distances = np.empty((len(queries), k), np.float32)

        def nearest_lists(start: int) -> tuple[Array, Array, Array]:
            return self._nearest_lists(queries[start : start + QUERY_BLOCK], probes)

        def scan(work: tuple[int, Array, Array, Array]) -> None:
            start, vectors, lists, to_centroids = work
            block = slice(start, start + len(vectors))
            distances[block], ids[block] = self._scanned.search_preassigned(vectors, k, lists, to_centroids)

        if self._gpu is not None:
            for first in range(0, len(queries), GPU_BATCH):
                block = slice(first, first + GPU_BATCH)
                distances[block], ids[block] = self._search_gpu(self._gpu, queries[block], k, probes)
            distances[ids < 0] = np.inf
            return ids, distances
        if self._by_list:
            step = batch_queries(self.shape.width, k, probes)
            for first in range(0, len(queries), step):
                block = slice(first, first + step)
                ids[block], distances[block] = self.scan_lists(self.probed(queries[block], nprobe), k).found()
            return ids, distances
        starts = range(0, len(queries), QUERY_BLOCK)
        pieces = zip(starts, self._pool.map(nearest_lists, starts), strict=True)
        work = (
            (start + first, *(array[first : first + SCAN_BLOCK] for array in arrays))
            for start, arrays in pieces
            for first in range(0, len(arrays[0]), SCAN_BLOCK)
        )
        list(self._pool.map(scan, work))
        distances[ids < 0] = np.inf
        return ids, distances

    def _nearest_lists(self, queries: Array, probes: int) -> tuple[Array, Array, Array]:
        """At most QUERY_BLOCK queries behind the transforms, and the lists nearest to them: see Probed."""
        vectors = padded(queries, QUERY_BLOCK)
        for transform in self._transforms:
            vectors = transform.apply(vectors)
        to_centroids, lists = self._inner.quantizer.search(vectors, probes)
        count = len(queries)
        return vectors[:count], lists[:count], to_centroids[:count]

    def probed(self, queries: Array, nprobe: int) -> "Probed":
        """The lists that `queries` [Q, D] probe. Raises DistlmError as `search`."""
        queries = check_queries(queries, self.shape.width, 1)
        probes = self.set_nprobe(nprobe)
        starts = range(0, len(queries), QUERY_BLOCK)
        found = self._pool.map(lambda start: self._nearest_lists(queries[start : start + QUERY_BLOCK], probes), starts)
        return Probed(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))

    def scan_lists(self, probed: "Probed", k: int, share: tuple[int, int] | None = None) -> Nearest:
        """The k nearest keys of queries among those of the lists [low, high) of `share` (None: all) that they probe."""
        before = self.nprobe
        self._inner.nprobe = 1
        try:
            return scan_by_list(self._inner, self._pool, probed.vectors, probed.lists, probed.to_centroids, k, share)
        finally:
            self._scanned.nprobe = before

    @cached_property
    def list_sizes(self) -> Array:
        """Keys of each list, int64 [nlist]."""
        lists = self._inner.invlists
        return np.array([lists.list_size(number) for number in range(self.nlist)], np.int64)

    def _search_gpu(self, gpu: GpuLists, vectors: Array, k: int, probes: int) -> tuple[Array, Array]:
        for transform in self._transforms:
            vectors = transform.apply(vectors)
        found = gpu.search(vectors, k, probes)
        if (k, probes) not in self._agreed:
            some = slice(0, COMPARED)
            check_agreement((found[0][some], found[1][some]), self._inner.search(vectors[some], k))
            self._agreed.add((k, probes))
        return found

    def encoded_distances(self, keys: Array) -> Array:
        """Squared L2 fp32 [n] between each of `keys` [n, D] and its own encoding, behind the index's transforms."""
        keys = check_queries(keys, self.shape.width, 1)
        distances = np.empty(len(keys), np.float32)
        with Encoder(self._index) as encoder:
            for start in range(0, len(keys), ENCODED_BLOCK):
                vectors = keys[start : start + ENCODED_BLOCK]
                decoded = self._inner.sa_decode(encoder.encode(vectors))
                for transform in self._transforms:
                    vectors = transform.apply(vectors)
                distances[start : start + len(vectors)] = np.square(vectors - decoded).sum(axis=1)
        return distances


def open_index(
    folder: Path, datastore: Datastore, scan: str = "queries", copies: Mapping[Path, Path] | None = None
) -> SearchIndex:
    """The finished index of a store: the merged file, or the parts side by side where they were not merged.

    scan: as of SearchIndex. copies: file → where it is read instead.

    Raises DistlmError when it is unfinished, of another store, or a file is truncated.
    """
    files, copies = IndexFolder(folder), copies or {}
    record = read_index_record(files, datastore)
    shape = Shape(record.rows, record.width, record.nlist, record.merged)
    if not record.merged:
        template = load_template(files, datastore)
        parts = [files.part(shard.index) for shard in datastore.shards]
        return SearchIndex(
            open_parts(template, [copies.get(part, part) for part in parts]), shape, files.parts, scan, record
        )
    # Without the table (IO_FLAG_SKIP_PRECOMPUTE_TABLE) PQ distances differ in their last bits and are slower.
    return SearchIndex(open_mapped(copies.get(files.merged, files.merged)), shape, files.merged, scan, record)


def check_queries(queries: Array, width: int, k: int) -> Array:
    """Queries as contiguous fp32 [Q, D]. Raises DistlmError for a wrong width, NaN or infinite values, k below 1."""
    if k < 1:
        raise DistlmError(f"knn.k={k}: must be at least 1")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise DistlmError(f"queries of shape {queries.shape}: expected [Q, {width}], the width of the store's keys")
    wide = np.ascontiguousarray(queries, dtype=np.float32)
    if not np.isfinite(wide).all():
        raise DistlmError("queries hold NaN or infinite values; the model that wrote them overflowed")
    return wide


def brute_search(datastore: Datastore, queries: Array, k: int) -> tuple[Array, Array]:
    """The exact k nearest keys of `queries` [Q, D] among all rows: ids int64 [Q, k], squared L2 fp32 [Q, k].

    Ordered by (distance, id); id −1 at distance inf where the store has fewer than k rows. faiss finds candidates
    chunk by chunk, then the distances of the best k + 16 are taken anew as Σ(q − key)², since the matrix-product form
    loses digits where distances are small beside the norms. Of keys equally far at the k-th place any may be kept.
    Memory: 128 MB of keys, and 48 bytes × Q × (k + 16).
    """
    faiss = require_faiss()
    queries = check_queries(queries, datastore.width, k)
    kept = min(k + BRUTE_SPARE, datastore.rows)
    ids = np.full((len(queries), kept), -1, np.int64)
    distances = np.full((len(queries), kept), np.inf, np.float32)
    chunk = max(1024, BRUTE_CHUNK_BYTES // (4 * datastore.width))
    for shard in datastore.shards:
        keys = datastore.keys(shard.index)
        for start in range(0, shard.rows, chunk):
            part = np.ascontiguousarray(keys[start : start + chunk], dtype=np.float32)
            near, rows = faiss.knn(queries, part, min(kept, len(part)))
            ids, distances = best_of_rows(
                np.concatenate([ids, rows + (shard.first_row + start)], axis=1),
                np.concatenate([distances, near], axis=1),
                kept,
            )
    distances = exact_distances(datastore, queries, ids)
    ids, distances = best_of_rows(ids, distances, min(k, kept))
    if kept < k:
        blank = ((0, 0), (0, k - ids.shape[1]))
        ids = np.pad(ids, blank, constant_values=-1)
        distances = np.pad(distances, blank, constant_values=np.inf)
    return ids, distances


def exact_distances(datastore: Datastore, queries: Array, ids: Array, dot: bool = False) -> Array:
    """Squared L2 fp32 [Q, k] between `queries` fp32 [Q, D] and the true keys of rows `ids` int64 [Q, k].

    With `dot` the negated dot product instead. Rows of id −1 get inf. Memory: about 192 MB, or three times k × D floats
    where that is more.
    """
    distances = np.full(ids.shape, np.inf, np.float32)
    step = max(1, (64 << 20) // (4 * datastore.width * max(1, ids.shape[1])))
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        valid = ids[block] >= 0
        keys, asked = gather_keys(datastore, ids[block][valid]), np.repeat(queries[block], valid.sum(axis=1), axis=0)
        if dot:
            distances[block][valid] = -np.einsum("nd,nd->n", keys, asked)
            continue
        keys -= asked
        distances[block][valid] = np.einsum("nd,nd->n", keys, keys)
    return distances


def exactly_ordered(datastore: Datastore, queries: Array, ids: Array, k: int) -> tuple[Array, Array]:
    """The k nearest of neighbours `ids` int64 [Q, ≥ k] of `queries` [Q, D] by their exact_distances, fp32 [Q, k]."""
    distances = exact_distances(datastore, np.asarray(queries, np.float32), ids)
    return best_of_rows(ids, distances, k)


def exact_places_distances(keys: Array, queries: Array, places: Array) -> tuple[Array, Array]:
    """Places int64 [Q, k] in `keys` fp32 [n, D] ordered anew by their true squared L2 to `queries` fp32 [Q, D]."""
    distances = np.full(places.shape, np.inf, np.float32)
    for row, (query, own) in enumerate(zip(queries, places, strict=True)):
        valid = own >= 0
        difference = keys[own[valid]] - query
        distances[row, valid] = np.einsum("nd,nd->n", difference, difference)
    return best_of_rows(places, distances, places.shape[1])


def best_of_rows(ids: Array, distances: Array, count: int) -> tuple[Array, Array]:
    """The `count` nearest of each row by (distance, id)."""
    order = np.lexsort((ids, distances), axis=-1)[:, :count]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1)
