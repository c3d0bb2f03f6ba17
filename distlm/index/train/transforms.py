"""Training the transforms before an inverted file: PCA over the ranks, others on rank 0.

A PCA needs the mean and the covariance of all vectors. Each block's product is of one shape on one thread, and the
blocks are added exactly (exact.py), so that the covariance has the same bits on any number of ranks and threads.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from distlm.index.build.blocks import padded
from distlm.index.build.encode import transforms_of
from distlm.index.faiss_module import faiss_threads, require_faiss
from distlm.index.layout import Array, deserialise, serialise
from distlm.index.train.exact import Exact, largest
from distlm.index.train.sample import BLOCK, Held, some_of
from distlm.index.train.team import Team, refused
from distlm.runtime.ranks.collective import rank0_first

OTHERS = 2
"""Draw of what other transforms are trained on (sample.some_of)."""
_OTHERS_ROWS = 65536
"""Most of them, which is what faiss's OPQ takes."""


def train_transforms(index: Any, held: Held, seed: int, team: Team, factory: str) -> Any:
    """The index with its transforms trained on the vectors that the ranks hold, one after the other; on every rank.
    Collective. Raises DistlmError, naming the `factory`, when faiss cannot."""
    faiss, comm = require_faiss(), team.comm
    for place in range(len(transforms_of(index))):
        transform = transforms_of(index)[place]
        if not transform.is_trained:
            if isinstance(transform, faiss.PCAMatrix):
                _train_pca(transform, held, team)
            else:
                gathered = comm.gather(held.at(some_of(held.total, _OTHERS_ROWS, seed, OTHERS)))
                rank0_first(
                    comm,
                    lambda of=transform, x=gathered: _by_faiss(of, x or [], team.node_threads, factory),  # type: ignore[misc]
                )
            index = deserialise(comm.bcast(serialise(index) if comm.rank == 0 else b""))
        with team.workers() as workers:
            held = transformed(held, [transforms_of(index)[place]], workers)
    return index


def transformed(held: Held, transforms: Sequence[Any], workers: ThreadPoolExecutor) -> Held:
    """The same rows behind some transforms, fp32."""

    def apply(block: Array) -> Array:
        piece = padded(block.astype(np.float32, copy=False), BLOCK)
        for transform in transforms:
            piece = transform.apply(piece)
        return piece[: len(block)]

    blocks = list(workers.map(apply, held.blocks()))
    empty = np.empty((0, transforms[-1].d_out), np.float32)
    return Held(np.concatenate([empty, *blocks]), held.first, held.total)


def _train_pca(transform: Any, held: Held, team: Team) -> None:
    mean, covariance = moments(held, team)
    if team.comm.rank == 0:
        faiss = require_faiss()
        values, vectors = _eigen(covariance)
        faiss.copy_array_to_vector(mean.astype(np.float32), transform.mean)
        faiss.copy_array_to_vector(values.astype(np.float32), transform.eigenvalues)
        faiss.copy_array_to_vector(vectors.astype(np.float32).reshape(-1), transform.PCAMat)
        transform.prepare_Ab()
        transform.is_trained = True


def moments(held: Held, team: Team) -> tuple[Array, Array]:
    """Mean fp64 [d] and covariance fp64 [d, d] of the vectors of all ranks. Collective.

    Memory: d × d fp64 twice, and fp32 for each thread.
    """
    comm, width = team.comm, held.vectors.shape[1]
    most = largest(held.vectors)
    exact = Exact.of(comm, most, held.total)
    total = np.zeros(width)
    for block in held.blocks():
        total += exact(block, held.half).sum(axis=0)
    comm.sum(total)
    mean = total / held.total
    # No centred value is larger than twice the largest, on any rank.
    exact = Exact.of(comm, 4 * most * most, held.total)
    products = np.zeros((width, width))
    with team.workers() as workers:
        for product in workers.map(lambda block: _product(block, mean), held.blocks()):
            products += exact(product)
    comm.sum(products)
    return mean, products / held.total


def _product(block: Array, mean: Array) -> Array:
    """Xᵀ X of the centred rows of a block, fp32 [d, d], on this thread."""
    centred = padded((block.astype(np.float64) - mean).astype(np.float32), BLOCK).T.copy()
    # faiss's product, because a thread can keep it to itself; numpy's has threads of its own.
    linear = require_faiss().LinearTransform(BLOCK, len(centred))
    require_faiss().copy_array_to_vector(centred.reshape(-1), linear.A)
    linear.is_trained = True
    found: Array = linear.apply(centred)
    return found


def _eigen(covariance: Array) -> tuple[Array, Array]:
    """Eigenvalues, falling, and eigenvectors as rows, on one thread; each vector's largest value is positive."""
    import torch

    from distlm.runtime.ranks.one_thread import one_thread

    with one_thread():
        rising, columns = torch.linalg.eigh(torch.from_numpy(covariance))
    vectors = columns.numpy().T[::-1].copy()
    signs = np.sign(vectors[np.arange(len(vectors)), np.abs(vectors).argmax(axis=1)])
    return rising.numpy()[::-1].copy(), vectors * signs[:, None]


def _by_faiss(transform: Any, vectors: list[Array], threads: int, factory: str) -> None:
    """With the node's cores: the other ranks wait. An OPQ's last bits follow how many they are."""
    with faiss_threads(threads), refused(factory):
        transform.train(np.concatenate(vectors))
