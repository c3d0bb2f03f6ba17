"""Training the codes of an inverted file: a product quantiser's codebooks over the ranks, others on rank 0.

A subspace is the unit of work: its k-means is faiss's own on one thread.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from distlm.index.build.integer_lists import pays
from distlm.index.faiss_module import faiss_threads, require_faiss
from distlm.index.layout import Array
from distlm.index.train.kmeans import nearest_of
from distlm.index.train.sample import BLOCK, Held
from distlm.index.train.team import Team, refused
from distlm.runtime.progress import Progress
from distlm.runtime.ranks.collective import rank0_first, together


def needed_rows(inner: Any) -> int:
    """Vectors that the codes of an untrained inverted file are trained on at most (faiss's rules)."""
    # 0: faiss would hand all of them to codes that learn nothing.
    return int(inner.train_encoder_num_vectors()) or BLOCK


def residuals(held: Held, centroids: Array | None, team: Team) -> tuple[Array, Array]:
    """This rank's vectors less the nearest centroid, fp32 [m, d], and its number, int64 [m]; None: the vectors as they
    are, and no numbers."""
    if centroids is None:
        return held.vectors.astype(np.float32), np.empty(0, np.int64)
    with team.workers() as workers:
        blocks = list(
            workers.map(
                nearest_of(centroids, team.device, pays(len(centroids), centroids.shape[1], held.total)), held.blocks()
            )
        )
    lists = np.concatenate([np.empty(0, np.int64), *blocks])
    return held.vectors.astype(np.float32) - centroids[lists], lists


def train_codes(inner: Any, vectors: Array, lists: Array, team: Team, factory: str) -> None:
    """Train an inverted file's codes on the vectors fp32 [m, d] that each rank holds, of `lists` int64 [m]. Collective;
    only rank 0's `inner` is changed. Raises DistlmError, naming the `factory`, when faiss cannot."""
    faiss = require_faiss()
    if isinstance(inner, faiss.IndexIVFPQ):
        books = codebooks(inner.pq, vectors, team, factory)
        if team.comm.rank == 0:
            faiss.copy_array_to_vector(books.reshape(-1), inner.pq.centroids)
    else:
        gathered, numbers = team.comm.gather(vectors), team.comm.gather(lists)
        rank0_first(team.comm, lambda: _by_faiss(inner, gathered or [], numbers or [], factory))


def codebooks(product: Any, vectors: Array, team: Team, factory: str) -> Array:
    """Centroids of a product quantiser, fp32 [M, 2^bits, d / M]. Collective. Memory: d / ranks values of the vectors of
    all ranks, twice."""
    comm, subspaces, width = team.comm, int(product.M), int(product.dsub)
    bounds = [subspaces * rank // comm.size for rank in range(comm.size + 1)]
    mine: list[Array] = []
    for owner, (low, high) in enumerate(pairwise(bounds)):
        pieces = comm.allgather(vectors[:, low * width : high * width])
        if owner == comm.rank:
            mine = [np.concatenate([piece[:, part * width : (part + 1) * width] for piece in pieces])
                    for part in range(high - low)]  # fmt: skip
    faiss = require_faiss()

    def train(part: Array) -> Array:
        means = faiss.Clustering(width, int(product.ksub), product.cp)
        means.train(part, faiss.IndexFlatL2(width))
        book: Array = faiss.vector_to_array(means.centroids).reshape(-1, width)
        return book

    books = together(comm, lambda: _train_all(mine, train, team, factory))
    return np.concatenate([np.stack(part) for part in comm.allgather(books) if part])


def _train_all(parts: list[Array], train: Callable[[Array], Array], team: Team, factory: str) -> list[Array]:
    books = []
    with (
        team.workers() as workers,
        Progress("index train: codebooks", len(parts), "subspaces", team.comm.rank) as progress,
        refused(factory),
    ):
        for book in workers.map(train, parts):
            books.append(book)
            progress.advance()
    return books


def _by_faiss(inner: Any, vectors: list[Array], lists: list[Array], factory: str) -> None:
    pointer = require_faiss().swig_ptr
    x, numbers = np.concatenate(vectors), np.concatenate(lists)
    # Its sums round by how many threads there are.
    with faiss_threads(1), refused(factory):
        inner.train_encoder(len(x), pointer(x), pointer(numbers) if inner.by_residual else None)
