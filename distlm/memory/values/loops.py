"""The compiled loops of distlm.memory.values.kernels; importing this imports numba, which takes half a second."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

BLOCK = 64
"""Rows of which the squares are summed together; the cuts between threads lie on multiples of it."""


def _compiled(loop: Callable[..., Any]) -> Any:
    try:
        return njit(loop, nogil=True, error_model="numpy", cache=True)
    except RuntimeError:  # There is no folder that compiled code can be kept in.
        return njit(loop, nogil=True, error_model="numpy")


@_compiled
def _bag(source: Any, index: Any, weights: Any, begin: int, end: int, out: Any) -> None:
    """out = Σ over the entries begin … end of weight·source row."""
    out[:] = 0
    for entry in range(begin, end):
        given, weight = source[index[entry]], weights[entry]
        for j in range(len(out)):
            out[j] += weight * given[j]


@_compiled
def _step(
    p: Any, m: Any, v: Any, gradient: Any, squares: Any, size: Any, small: Any,
    scale: Any, rest1: Any, beta2: Any, rest2: Any,
) -> None:  # fmt: skip
    """One update of some columns of a row, all fp32 [n]; squares += gradient²."""
    for j in range(len(p)):
        g = gradient[j] * scale
        mean = m[j] + rest1 * (g - m[j])
        square = v[j] * beta2 + g * g * rest2
        m[j] = mean
        v[j] = square
        p[j] -= mean * size / (np.sqrt(square) + small)
        squares[j] += g * g


@_compiled
def _widen(row: Any, out: Any) -> None:
    """bf16 as uint16 → fp32."""
    for j in range(len(out)):
        out[j] = np.uint32(np.uint32(row[j]) << np.uint32(16)).view(np.float32)


@_compiled
def _narrow(m: Any, v: Any, row_m: Any, row_v: Any, key: Any, column: int) -> None:
    """fp32 → bf16 as uint16, as distlm.memory.values.random.rounded does: `noise` is its hash of (key, column)."""
    for j in range(len(m)):
        noise = np.uint32(np.uint32(np.uint32(column + j) * np.uint32(0x9E3779B1)) ^ key)
        noise = np.uint32(np.uint32(noise ^ np.uint32(noise >> np.uint32(16))) * np.uint32(0x85EBCA6B))
        noise = np.uint32(np.uint32(noise ^ np.uint32(noise >> np.uint32(13))) * np.uint32(0xC2B2AE35))
        noise = np.uint32(noise ^ np.uint32(noise >> np.uint32(16)))
        of_m = np.uint32(np.float32(m[j]).view(np.uint32) + np.uint32(noise & np.uint32(0xFFFF)))
        of_v = np.uint32(np.float32(v[j]).view(np.uint32) + np.uint32(noise >> np.uint32(16)))
        row_m[j] = np.uint16(of_m >> np.uint32(16))
        row_v[j] = np.uint16(of_v >> np.uint32(16))


@_compiled
def _total(x: Any) -> float:
    """Σ x, fp64, in order."""
    total = 0.0
    for j in range(len(x)):
        total += x[j]
    return total


@_compiled
def sum_rows(first: int, last: int, out: Any, source: Any, index: Any, weights: Any, offsets: Any) -> None:
    """out[first:last], the sums of those bags."""
    for row in range(first, last):
        _bag(source, index, weights, offsets[row], offsets[row + 1], out[row])


@_compiled
def adam_rows(
    first: int, last: int, squares: Any, values: Any, exp_avg: Any, exp_avg_sq: Any, rows: Any,
    source: Any, index: Any, weights: Any, offsets: Any, sizes: Any, eps: Any,
    scale: Any, rest1: Any, beta2: Any, rest2: Any,
) -> None:  # fmt: skip
    """Rows first … last by moments in fp32; squares [blocks] gets Σ g² of each block."""
    width = values.shape[1]
    gradient, of_block = np.zeros(width, np.float32), np.zeros(width, np.float32)
    own = len(sizes) > 1
    for begin in range(first, last, BLOCK):
        of_block[:] = 0
        for row in range(begin, min(begin + BLOCK, last)):
            _bag(source, index, weights, offsets[row], offsets[row + 1], gradient)
            slot = rows[row]
            size, small = (sizes[row], eps[row]) if own else (sizes[0], eps[0])
            _step(
                values[slot], exp_avg[slot], exp_avg_sq[slot], gradient, of_block, size, small,
                scale, rest1, beta2, rest2,
            )  # fmt: skip
        squares[begin // BLOCK] = _total(of_block)


@_compiled
def adam_rows_bf16(
    first: int, last: int, squares: Any, values: Any, exp_avg: Any, exp_avg_sq: Any, rows: Any,
    source: Any, index: Any, weights: Any, offsets: Any, sizes: Any, eps: Any,
    scale: Any, rest1: Any, beta2: Any, rest2: Any, keys: Any, first_column: int,
) -> None:  # fmt: skip
    """The same by moments in bf16 (as uint16), rounded by `keys`, uint32 [U], and the columns from first_column on."""
    width = values.shape[1]
    gradient, of_block = np.zeros(width, np.float32), np.zeros(width, np.float32)
    m, v = np.zeros(width, np.float32), np.zeros(width, np.float32)
    own = len(sizes) > 1
    for begin in range(first, last, BLOCK):
        of_block[:] = 0
        for row in range(begin, min(begin + BLOCK, last)):
            _bag(source, index, weights, offsets[row], offsets[row + 1], gradient)
            slot = rows[row]
            size, small = (sizes[row], eps[row]) if own else (sizes[0], eps[0])
            _widen(exp_avg[slot], m)
            _widen(exp_avg_sq[slot], v)
            _step(values[slot], m, v, gradient, of_block, size, small, scale, rest1, beta2, rest2)
            _narrow(m, v, exp_avg[slot], exp_avg_sq[slot], keys[row], first_column)
        squares[begin // BLOCK] = _total(of_block)
