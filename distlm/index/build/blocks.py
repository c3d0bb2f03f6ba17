"""Fixed blocks of vectors: a matrix product rounds differently for other shapes."""

from math import ceil
from typing import Any

import numpy as np

from distlm.index.layout import Array

PRODUCT = 1 << 17
"""Rows × values of one search among centroids: below 128,000 faiss takes a path that is up to six times slower
(measured with faiss-cpu 1.15)."""


def product_rows(width: int) -> int:
    """Vectors of `width` values to compare with centroids at once: whole thousands (1,024), so many that it is fast."""
    return ceil(PRODUCT / (width * 1024)) * 1024


def padded(vectors: Array, rows: int) -> Array:
    """`vectors` fp32 [≤ rows, D] with zeros below, [rows, D]."""
    if len(vectors) == rows:
        return vectors
    return np.concatenate([vectors, np.zeros((rows - len(vectors), vectors.shape[1]), np.float32)])


def nearest_in(index: Any, vectors: Array) -> Array:
    """The nearest of a faiss index, int64 [n], of each of `vectors` fp32 [n, d], by products of product_rows."""
    found, rows = np.empty(len(vectors), np.int64), product_rows(vectors.shape[1])
    for start in range(0, len(vectors), rows):
        piece = vectors[start : start + rows]
        found[start : start + len(piece)] = index.search(padded(piece, rows), 1)[1][: len(piece), 0]
    return found
