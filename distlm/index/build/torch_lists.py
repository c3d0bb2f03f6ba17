"""The nearest coarse centroid of each key by torch, on this rank's GPU: adding spends most of its time on it.

The same lists as faiss finds, up to ties: fp32 products, without TF32, whose short mantissa would move
keys to other lists.
"""

from typing import Any

import numpy as np

from distlm.index.faiss_module import require_faiss
from distlm.index.layout import Array
from distlm.runtime.ranks.device import default_device, may_have_accelerator

PRODUCT_BYTES = 64 << 20
"""Most bytes of one matrix of distances: every thread of an encoder holds one on the device."""


def gpu_device() -> str:
    """This rank's GPU as torch names it; empty without one."""
    if not may_have_accelerator():
        return ""
    device = default_device()
    return "" if device.type == "cpu" else str(device)


class TorchLists:
    """Centroids fp32 [nlist, d] on a device."""

    def __init__(self, centroids: Array, device: str) -> None:
        import torch

        self._torch, self._device = torch, torch.device(device)
        there = torch.from_numpy(centroids).to(self._device)
        self._centroids = there.t().contiguous()
        self._half_norms = there.square().sum(1) / 2
        # A power of two, so that blocks of 1,024 keys are cut into products of one shape.
        self._rows = 1 << max(1, PRODUCT_BYTES // (4 * len(centroids))).bit_length() - 1

    @classmethod
    def of(cls, inner: Any, device: str) -> "TorchLists":
        """Those of an inverted file's coarse quantiser."""
        return cls(np.asarray(inner.quantizer.reconstruct_n(0, inner.nlist)), device)

    @staticmethod
    def takes(inner: Any) -> bool:
        """Whether the coarse quantiser compares with every centroid; others (HNSW) are faiss's own."""
        faiss = require_faiss()
        return isinstance(faiss.downcast_index(inner.quantizer), faiss.IndexFlat)

    def nearest(self, vectors: Array) -> Array:
        """The list of each of `vectors` fp32 [n, d]: int64 [n]. Memory on the device: PRODUCT_BYTES and the vectors."""
        torch = self._torch
        tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            with torch.inference_mode():
                keys = torch.from_numpy(vectors).to(self._device)
                # Nearest by squared L2: the largest product less half the centroid's norm.
                pieces = keys.split(self._rows)
                lists = [torch.addmm(-self._half_norms, piece, self._centroids).argmax(1) for piece in pieces]
                found: Array = torch.cat(lists).cpu().numpy()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32
        return found
