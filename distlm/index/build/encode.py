"""Keys to list numbers and codes, the same bytes for any number of threads and ranks.

A matrix product rounds differently for other shapes and thread counts, so that a key halfway between two centroids
changes lists (measured: one of 60,000), and every last bit behind a PCA. Here each product is of one fixed block of
rows on one thread; threads take different blocks. Where integer_lists.py finds the lists, they do not depend on blocks.
faiss's own add agrees up to such ties.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from typing import Any

import numpy as np

from distlm.index.build import product_codes
from distlm.index.build.blocks import nearest_in, padded, product_rows
from distlm.index.build.integer_lists import TRIAL, IntegerLists
from distlm.index.build.product_codes import ProductCodes
from distlm.index.build.torch_lists import TorchLists
from distlm.index.factory import inverted_file
from distlm.index.faiss_module import rank_threads, require_faiss
from distlm.index.layout import Array

BLOCK = 1024
"""Keys in one product of a transform: from here on faiss's results agree with those of larger batches."""
LEAST_BATCH = 16384
"""Fewest keys read at once: reading ahead of the encoder pays from here on."""
CODE_BLOCK = 256
"""Keys faiss's own product quantiser encodes at once: it allocates block × M × 1 KiB and is fastest at 128 to 512."""


class Encoder:
    """Encodes keys for one index on `threads` threads; their lists are found on torch's `device` where one is given.

    `keys`: how many the whole index will have, as the way to find lists that is faster for few falls otherwise at ties.
    Use in a `with` block.
    """

    def __init__(self, index: Any, threads: int | None = None, device: str = "", keys: int = 0) -> None:
        faiss = require_faiss()
        self._faiss = faiss
        self._transforms = transforms_of(index)
        self._index = index
        self._inner = inverted_file(index)
        self.row_bytes = int(self._inner.coarse_code_size() + self._inner.code_size)
        """Of a key's list number and code."""
        self._product = ProductCodes(self._inner) if product_codes.takes(self._inner) else None
        self.block = block_of(self._inner)
        """Most keys of one `encode`, and what `add` gives to a thread at a time."""
        self._lists: TorchLists | IntegerLists | None = None
        if device and TorchLists.takes(self._inner):
            self._lists = TorchLists.of(self._inner, device)
        elif IntegerLists.takes(self._inner, keys):
            self._lists = IntegerLists(self._inner.quantizer)
        self._tried = False
        self._threads = threads or rank_threads()
        self._pool = one_thread_workers(self._threads)

    def __enter__(self) -> "Encoder":
        return self

    @property
    def batch(self) -> int:
        """Keys to give to one `add`: whole blocks, one for every thread at least."""
        return self.block * max(self._threads, ceil(LEAST_BATCH / self.block))

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown()

    def add(self, keys: Array, ids: Array) -> None:
        """Append keys fp32 [n, D] under `ids` int64 [n], in order."""
        done = 0
        for codes in self.codes(keys):
            self._inner.add_sa_codes(codes, ids[done : done + len(codes)])
            done += len(codes)
        self._index.ntotal = self._inner.ntotal

    def settle(self, keys: Array) -> None:
        """Choose how lists are found by the first of these keys fp32 [n, D]; later calls change nothing.

        Both ways give the same lists but at ties. So that nothing depends on the ranks, those that share an index
        give the same keys: its first (TRIAL).
        """
        if self._tried or not len(keys):
            return
        self._tried = True
        some = keys[:TRIAL]
        if isinstance(self._lists, IntegerLists) and not self._lists.suits(self._transformed(some)[: len(some)]):
            self._lists = None

    def codes(self, keys: Array) -> Iterator[Array]:
        """List numbers and codes of keys fp32 [n, D], block by block in order: as `encode`."""
        self.settle(keys)
        starts = range(0, len(keys), self.block)
        return self._pool.map(lambda start: self.encode(keys[start : start + self.block]), starts)

    def encode(self, keys: Array) -> Array:
        """List number and code, uint8 [n, coarse + code_size], of at most `block` keys fp32 [n, D], on this thread."""
        coarse = self._inner.coarse_code_size()
        vectors, lists = self._assign(keys)
        codes = np.empty((len(vectors), self.row_bytes), np.uint8)
        # The last rows of a shard are not padded to a block where more than half of it would be blank.
        if self._product and 2 * len(vectors) >= self._product.rows:
            codes[:, :coarse] = lists.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :coarse]
            codes[:, coarse:] = self._product.encode(vectors, lists)
            return codes[: len(keys)]
        pointer = self._faiss.swig_ptr
        for start in range(0, len(vectors), CODE_BLOCK):
            # Named, because a pointer keeps no reference to the array it was taken from.
            block, numbers, out = (array[start : start + CODE_BLOCK] for array in (vectors, lists, codes))
            self._inner.encode_vectors(len(block), pointer(block), pointer(numbers), pointer(out), True)
        return codes[: len(keys)]

    def _assign(self, keys: Array) -> tuple[Array, Array]:
        """Transformed keys fp32 [N, d] and their lists int64 [N]; N is n rounded up to whole products."""
        vectors = self._transformed(keys)
        if self._lists:
            return vectors, self._lists.nearest(vectors)
        return vectors, nearest_in(self._inner.quantizer, vectors)

    def _transformed(self, keys: Array) -> Array:
        """Keys behind the transforms, fp32 [N, d]; N is n rounded up to whole blocks."""
        if not self._transforms and len(keys) % BLOCK == 0:
            return keys
        pieces = []
        for start in range(0, len(keys), BLOCK):
            piece = padded(keys[start : start + BLOCK], BLOCK)
            for transform in self._transforms:
                piece = transform.apply(piece)
            pieces.append(piece)
        return np.concatenate(pieces)


def block_of(inner: Any) -> int:
    """Most keys of one Encoder.encode for an inverted file."""
    rows = product_rows(inner.d)
    return max(rows, product_rows(int(inner.pq.dsub))) if product_codes.takes(inner) else rows


def transforms_of(index: Any) -> list[Any]:
    """The vector transforms before the inverted file, in order; valid while `index` lives."""
    faiss = require_faiss()
    outer = faiss.downcast_index(index)
    if not isinstance(outer, faiss.IndexPreTransform):
        return []
    return [faiss.downcast_VectorTransform(outer.chain.at(place)) for place in range(outer.chain.size())]


def one_thread_workers(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads each run faiss on themselves alone (the OpenMP count belongs to the calling thread)."""
    faiss = require_faiss()
    return ThreadPoolExecutor(threads, initializer=lambda: faiss.omp_set_num_threads(1))
