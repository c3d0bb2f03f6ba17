"""The nearest coarse centroid of each key by products of 8-bit integers, which leave a few to be compared exactly.

A processor with VNNI multiplies int8 at four times its rate of fp32 (measured on one core: 430 against 100 billion
operations a second). Keys and centroids, less the centroids' mean, are rounded to int8. How far a product can be off
follows from what rounding took away (Cauchy–Schwarz), and every centroid that may still be the nearest is kept: 1.1 to
1.3 of 4,096 in the mean. Their true distances in fp32 decide; of equals the first centroid is taken. So lists are
faiss's up to ties, and do not depend on the blocks in which keys come.
"""

import threading
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from distlm.index.build.blocks import nearest_in
from distlm.index.build.torch_lists import TorchLists
from distlm.index.faiss_module import require_faiss
from distlm.index.layout import Array
from distlm.runtime.speeds import processor_flags

LEAST_WORK = 1e11
"""Keys × centroids × values from which loading torch (two seconds) pays."""
LEAST_LISTS = 512
"""Fewer centroids cost no more than rounding a key."""
MOST_CANDIDATES = 64
"""Rows with more centroids left are faiss's."""
TRIAL = 256
"""Vectors by which it is decided whether the others are found this way."""
SCORES = 1 << 20
"""Scores (rows × centroids) at once: 4 MB."""
TORCH_BYTES = 190 << 20
"""Torch in memory, most of it shared by the processes of a node."""
GROUP = 16
"""Centroids of which the best is found before any is compared."""
_FAR = 1 << 30
_CPU = Path("/proc/cpuinfo")
FAST_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8"}
"""Flags of processors with fast products of int8: one of them is enough."""
_MOST_WIDTH = 32768
"""Sums stay within int32."""


class IntegerLists:
    """The K centroids of a flat faiss index, also as int8. Memory: five quarters of K × d fp32."""

    def __init__(self, index: Any) -> None:
        import torch

        self._torch, self._index = torch, index
        self._centroids = np.ascontiguousarray(index.reconstruct_n(0, index.ntotal), np.float32)
        self._mean = self._centroids.mean(axis=0, dtype=np.float64).astype(np.float32)
        centred = self._centroids - self._mean
        # Centroids that are all the same have no scale.
        self._scale = np.float32(max(float(np.abs(centred).max()) / 127, 1e-30))
        rounded = np.rint(centred / self._scale)
        count, width = centred.shape
        # Whole groups: blank centroids that no key is near to.
        self._groups = ceil(count / GROUP)
        numbers = np.zeros((width, GROUP * self._groups), np.int8)
        numbers[:, :count] = rounded.T
        self._numbers = torch.from_numpy(numbers)
        norms = np.square(centred, dtype=np.float64).sum(axis=1)
        self._half_norms = norms / 2
        self._largest = float(np.sqrt(norms.max()))
        # Subtracting the mean in fp32 rounds, too.
        self._rounding = 2.0**-23 * float(np.linalg.norm(self._mean.astype(np.float64)))
        lost = np.square(centred - self._scale * rounded, dtype=np.float64).sum(axis=1)
        self._lost = float(np.sqrt(lost.max())) + self._rounding
        self._rows = min(max(SCORES // len(centred), 32), 1024)
        self._thread = threading.local()

    @staticmethod
    def takes(inner: Any, keys: int) -> bool:
        """Whether finding the lists of so many keys is faster this way, on this machine."""
        flat = TorchLists.takes(inner) and inner.quantizer.metric_type == require_faiss().METRIC_L2
        return flat and pays(inner.nlist, inner.d, keys)

    def suits(self, vectors: Array) -> bool:
        """Whether few of these vectors fp32 [n, d] have many candidates: others are slower than by faiss alone."""
        return float(np.mean(self._candidates(vectors)[2] > MOST_CANDIDATES)) < 0.2

    def nearest(self, vectors: Array) -> Array:
        """The list of each of `vectors` fp32 [n, d]: int64 [n], on this thread. Memory: 6 MB."""
        if not getattr(self._thread, "alone", False) and threading.current_thread() is not threading.main_thread():
            # OpenMP's count belongs to a thread.
            self._torch.set_num_threads(1)
            self._thread.alone = True
        found = np.empty(len(vectors), np.int64)
        hard = [np.empty(0, np.int64)]
        for start in range(0, len(vectors), self._rows):
            block = vectors[start : start + self._rows]
            rows, lists, counts = self._candidates(block)
            # No candidate: for keys near the largest fp32 the slack is not a number.
            many = (counts > MOST_CANDIDATES) | (counts == 0)
            if many.any():
                hard.append(start + np.flatnonzero(many))
                few = ~many[rows]
                rows, lists = rows[few], lists[few]
            nearest = self._compared(block, rows, lists)
            found[start : start + len(block)][~many] = nearest
        left = np.concatenate(hard)
        if len(left):
            found[left] = nearest_in(self._index, vectors[left])
        return found

    def _candidates(self, block: Array) -> tuple[Array, Array, Array]:
        """Pairs of a row and a centroid that may be its nearest, int64 [p] each, rising; and how many a row has [n]."""
        centred = block - self._mean
        # Not below: the norms in units of both scales stay within int32.
        scale = max(np.abs(centred).max() / np.float32(127), self._scale / 4)
        numbers = np.rint(centred / scale)
        products = self._torch._int_mm(self._torch.from_numpy(numbers.astype(np.int8)), self._numbers)
        numbers *= scale
        centred -= numbers
        size, lost = (np.sqrt(np.einsum("nd,nd->n", part, part)) for part in (numbers, centred))
        unit = float(scale) * float(self._scale)
        norms = np.full(products.shape[1], _FAR, np.int32)
        norms[: len(self._half_norms)] = np.rint(self._half_norms / unit)
        products -= self._torch.from_numpy(norms)
        # Of both, the best and the one compared with it; a thousandth for rounding in fp32, 1 for the norms'.
        slack = 2.002 * ((lost + self._rounding) * self._largest + size * self._lost) / unit + 1
        # The best of each group first: few groups are looked into. Centroids g, g + groups, … are group g.
        grouped = products.view(len(block), GROUP, self._groups)
        best = grouped.amax(1).numpy()
        least = np.maximum(best.max(axis=1) - np.ceil(slack), np.iinfo(np.int32).min).astype(np.int32)
        rows, groups = np.divmod(np.flatnonzero(best >= least[:, None]), self._groups)
        hits, members = np.nonzero(grouped.numpy()[rows, :, groups] >= least[rows, None])
        places = np.sort(rows[hits] * products.shape[1] + members * self._groups + groups[hits])
        rows, lists = np.divmod(places, products.shape[1])
        there = lists < len(self._half_norms)
        rows, lists = rows[there], lists[there]
        return rows, lists, np.bincount(rows, minlength=len(block))

    def _compared(self, block: Array, rows: Array, lists: Array) -> Array:
        """Of each row that is in `rows` [p], rising, the nearest of its `lists` [p]: int64."""
        if not len(rows):
            return lists
        faiss = require_faiss()
        pointer, distances = faiss.swig_ptr, np.empty(len(rows), np.float32)
        faiss.pairwise_indexed_L2sqr(
            block.shape[1], len(rows), pointer(block), pointer(rows), pointer(self._centroids), pointer(lists),
            pointer(distances),
        )  # fmt: skip
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        least = np.repeat(np.minimum.reduceat(distances, starts), np.diff(starts, append=len(rows)))
        at_least = np.flatnonzero(distances == least)
        return lists[at_least[np.flatnonzero(np.diff(rows[at_least], prepend=-1))]]


def pays(count: int, width: int, keys: int) -> bool:
    """Whether the nearest of `count` centroids of `width` values are found faster this way for so many keys, here."""
    large = count >= LEAST_LISTS and width <= _MOST_WIDTH and float(keys) * count * width >= LEAST_WORK
    return large and multiplies_int8()


def memory(count: int, width: int, keys: int) -> int:
    """Bytes of a process that finds lists so, on one thread; 0 where it does not."""
    return TORCH_BYTES + 5 * count * width + 6 * SCORES if pays(count, width, keys) else 0


@cache
def multiplies_int8() -> bool:
    """Whether this processor multiplies int8 fast, and torch does so exactly."""
    if not FAST_INT8 & processor_flags(_CPU):
        return False
    import torch

    if not hasattr(torch, "_int_mm") or not torch.backends.mkldnn.is_available():
        return False
    # Without VNNI sums of two products are cut to 16 bits.
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, -largest) == -64 * 127 * 127).all())
