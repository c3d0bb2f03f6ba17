"""Lloyd's k-means over the ranks.

The rules are faiss's: k of the keys to begin with, a fixed number of iterations, an empty cluster takes half of a large
one. Its draws are not: whatever is random follows from the seed and the iteration.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from distlm.index.build.blocks import padded
from distlm.index.build.integer_lists import TRIAL, IntegerLists, pays
from distlm.index.build.torch_lists import TorchLists
from distlm.index.faiss_module import require_faiss
from distlm.index.layout import Array
from distlm.index.train.exact import Exact, largest
from distlm.index.train.kept import Kept
from distlm.index.train.sample import BLOCK, Held, some_of
from distlm.index.train.team import Team
from distlm.runtime.progress import Progress
from distlm.runtime.ranks.collective import rank0_first

Nearest = Callable[[Array], Array]
"""Vectors → the centroid of each."""
FIRST = 1
"""Draw of the first centroids (sample.some_of)."""
TRIED = 5
"""Draw of the vectors by which it is chosen how others are compared (sample.some_of)."""
_APART = 1 / 1024
"""How far the halves of a cluster are moved apart, relative (faiss)."""


def kmeans(
    held: Held, count: int, iterations: int, seed: int, team: Team, kept: Kept | None = None, planned: int = 0
) -> Array:
    """`count` centroids, fp32 [count, d], of the vectors that the ranks of `team` hold together. Collective.

    planned: vectors to find the nearest centroid of, over all iterations, by which it is chosen how; by default as many
    as there are. With `kept` it goes on from where it was killed. Memory of a rank: what it holds, and the sums, count
    × d fp64.
    """
    comm = team.comm
    begun = rank0_first(comm, kept.load) if kept else None
    first = first_centroids(held, count, seed, team)
    done, centroids = begun or (0, first)
    integers = _integers_suit(held, first, planned or held.total * iterations, seed, team)
    exact = Exact.of(comm, largest(held.vectors), held.total)
    with (
        team.workers() as workers,
        Progress("index train: k-means", iterations, "iterations", comm.rank, done=done) as progress,
    ):
        for iteration in range(done, iterations):
            team.check()
            find = nearest_of(centroids, team.device, integers)
            sums, sizes = cluster_sums(held, find, centroids.shape, exact, workers)
            comm.sum(sums)
            comm.sum(sizes)
            centroids = means(sums, sizes, centroids, seed, iteration)
            if kept and iteration + 1 < iterations:
                rank0_first(comm, lambda done=iteration + 1, now=centroids: kept.save(done, now))  # type: ignore[misc]
            progress.advance()
    return centroids


def first_centroids(held: Held, count: int, seed: int, team: Team) -> Array:
    """`count` of all vectors, fp32 [count, d]. Collective."""
    places = some_of(held.total, count, seed, FIRST)
    # Ranks hold their places in order.
    found = np.concatenate(team.comm.allgather(held.at(places)))
    if len(found) == count:
        return found
    # Fewer vectors than centroids: some stand more than once.
    return found[np.arange(count) % len(found)]


def _integers_suit(held: Held, centroids: Array, planned: int, seed: int, team: Team) -> bool:
    """Whether integers find the nearest centroids faster (integer_lists.py). Collective: by the same few vectors on any
    number of ranks, also where a killed k-means goes on."""
    # Nodes may differ.
    if not all(team.comm.allgather(not team.device and pays(len(centroids), centroids.shape[1], planned))):
        return False
    some = np.concatenate(team.comm.allgather(held.at(some_of(held.total, TRIAL, seed, TRIED))))
    return rank0_first(team.comm, lambda: IntegerLists(flat_index(centroids)).suits(some))


def cluster_sums(
    held: Held, find: Nearest, shape: tuple[int, ...], exact: Exact, workers: ThreadPoolExecutor
) -> tuple[Array, Array]:
    """Sum and number of this rank's vectors that `find` assigns to each centroid: fp64 [k, d] = `shape`, int64 [k]."""
    sums, sizes = np.zeros(shape), np.zeros(shape[0], np.int64)
    for block, lists in zip(held.blocks(), workers.map(find, held.blocks()), strict=True):
        sizes += np.bincount(lists, minlength=len(sums))
        # A row at a time: four times as fast as sorting for np.add.reduceat.
        for row, place in zip(exact(block, held.half), lists.tolist(), strict=True):
            sums[place] += row
    return sums, sizes


def nearest_of(centroids: Array, device: str = "", integers: bool = False) -> Nearest:
    """A function: the nearest centroid, int64 [n], of each of at most BLOCK vectors [n, d], by products of one shape;
    by integer_lists.py where `integers` says so."""
    if device:
        return _cut(TorchLists(centroids, device).nearest)
    index = flat_index(centroids)
    if integers:
        nearest = IntegerLists(index).nearest
        return lambda block: nearest(np.ascontiguousarray(block, np.float32))
    return _cut(lambda block: index.search(block, 1)[1][:, 0])


def flat_index(centroids: Array) -> Any:
    """A faiss index of centroids fp32 [k, d]."""
    index = require_faiss().IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    return index


def _cut(find: Nearest) -> Nearest:
    return lambda block: find(padded(block.astype(np.float32, copy=False), BLOCK))[: len(block)]


def means(sums: Array, sizes: Array, before: Array, seed: int, iteration: int) -> Array:
    """The next centroids, fp32 [k, d]; an empty cluster takes half of another, drawn by how many it has."""
    centroids = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], before).astype(np.float32)
    if (empty := np.flatnonzero(sizes == 0)).size:
        _split(centroids, sizes.copy(), empty.tolist(), seed, iteration)
    return centroids


def _split(centroids: Array, sizes: Array, empty: Sequence[int], seed: int, iteration: int) -> None:
    random = np.random.Generator(np.random.Philox(key=np.array([seed, 1 << 32 | iteration], np.uint64)))
    for place in empty:
        chances = np.cumsum(np.maximum(sizes - 1, 0))
        if not chances[-1]:
            # No cluster has two vectors: there is nothing to halve.
            return
        whole: Any = int(np.searchsorted(chances, random.integers(chances[-1]), side="right"))
        # By turns a little larger and smaller.
        moved = np.where(np.arange(centroids.shape[1]) % 2 == 0, 1 + _APART, 1 - _APART).astype(np.float32)
        centroids[place] = centroids[whole] * moved
        centroids[whole] *= 2 - moved
        sizes[place] = sizes[whole] // 2
        sizes[whole] -= sizes[place]
