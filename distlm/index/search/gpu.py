"""A search on this rank's GPU by faiss-gpu, compared with the processor's on some queries before it is believed.

Some builds of faiss-gpu have returned wrong neighbours without a word (imported before torch; queries on another GPU),
or neighbours in no order. So whatever build this is: the first queries are searched on both.
"""

from typing import Any

import numpy as np

from distlm.errors import DistlmError
from distlm.index.build.torch_lists import gpu_device
from distlm.index.faiss_module import require_faiss
from distlm.index.layout import Array
from distlm.index.search.candidates import MOST_ON_GPU
from distlm.installed import install

COMPARED = 64
"""Queries that are searched on both."""
LEAST_OVERLAP = 0.95
"""Share of the processor's neighbours that the GPU must find: its look-up tables are fp16, which swaps near ties."""


class GpuLists:
    """A copy of an inverted file (IndexIVF over L2) on a GPU: its codes, and 8 bytes of id a key.

    Product codes need 8 bits: faiss's own kernels have no others. Look-up tables are fp16, because those of 64 codes a
    key do not fit into the GPU's shared memory otherwise.
    """

    def __init__(self, inner: Any) -> None:
        """Raises DistlmError without faiss-gpu or a GPU, and for a kind or size that it does not take."""
        faiss = require_faiss()
        device = gpu_device()
        if not hasattr(faiss, "StandardGpuResources") or not device:
            missing = "this process sees no GPU" if hasattr(faiss, "StandardGpuResources") else "faiss-gpu is missing"
            raise DistlmError(
                f"knn.scan=gpu: {missing}; set knn.scan=queries, or start where a GPU is and {install('gpu')}"
            )
        options = faiss.GpuClonerOptions()
        options.useFloat16 = True
        # cuVS kernels have returned neighbours out of order.
        options.use_cuvs = False
        self._resources = faiss.StandardGpuResources()
        number = int(device.partition(":")[2] or 0)
        try:
            self._index = faiss.index_cpu_to_gpu(self._resources, number, inner, options)
        except RuntimeError as error:
            raise DistlmError(
                f"knn.scan=gpu: faiss cannot put this {type(inner).__name__} of {inner.ntotal} keys of "
                f"{inner.code_size} bytes on {device} ({_reason(error)}); set knn.scan=queries, or build an index with "
                "8-bit codes that fits, such as index.factory=IVF4096,PQ64"
            ) from error

    def search(self, vectors: Array, k: int, nprobe: int) -> tuple[Array, Array]:
        """Squared L2 fp32 [n, k], ascending, and ids int64 [n, k] (−1: fewer than k) of `vectors` fp32 [n, d]."""
        for what, value in (("neighbours", k), ("lists", nprobe)):
            if value > MOST_ON_GPU:
                raise DistlmError(
                    f"knn.scan=gpu: takes at most {MOST_ON_GPU} {what}, not {value}; set knn.scan=queries"
                )
        self._index.nprobe = nprobe
        distances, ids = self._index.search(vectors, k)
        return distances, ids


def check_agreement(found: tuple[Array, Array], wanted: tuple[Array, Array]) -> float:
    """Share of the processor's neighbours, `wanted`, that a GPU has `found`; both (squared L2 fp32, ids int64) [n, k].

    Raises DistlmError when it is below LEAST_OVERLAP, when distances do not rise, when an id comes twice in a row, or
    when those of common neighbours differ by more than fp16 sums explain (1 %).
    """
    (distances, ids), (true_distances, true_ids) = found, wanted
    filled = ids >= 0
    common = 0
    worst = 0.0
    for mine, near, theirs, true in zip(ids, distances, true_ids, true_distances, strict=True):
        both, at, true_at = np.intersect1d(mine[mine >= 0], theirs[theirs >= 0], return_indices=True)
        common += len(both)
        if len(both):
            scale = np.maximum(true[theirs >= 0][true_at], np.finfo(np.float32).tiny)
            worst = max(worst, float((np.abs(near[mine >= 0][at] - true[theirs >= 0][true_at]) / scale).max()))
    overlap = common / max(1, int((true_ids >= 0).sum()))
    rising = bool((distances[:, :-1] <= distances[:, 1:])[filled[:, 1:]].all())
    twice = any(len(np.unique(row[row >= 0])) < (row >= 0).sum() for row in ids)
    wrong = [
        text
        for text, happened in (
            (f"only {overlap:.1%} of the processor's neighbours found", overlap < LEAST_OVERLAP),
            ("neighbours out of order", not rising),
            ("the same neighbour twice", twice),
            (f"a distance off by {worst:.1%}", worst > 0.01),
        )
        if happened
    ]
    if wrong:
        raise DistlmError(
            f"knn.scan=gpu: faiss-gpu and the processor disagree about {len(ids)} queries ({'; '.join(wrong)}); this "
            "build of faiss-gpu does not work here: set knn.scan=queries, or install another"
        )
    return overlap


def _reason(error: RuntimeError) -> str:
    """The last line of faiss's message, without its place in the source."""
    return str(error).strip().splitlines()[-1].rpartition(": ")[2] or type(error).__name__
