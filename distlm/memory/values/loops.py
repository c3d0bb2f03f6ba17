"""The compiled loops of distlm.memory.values.kernels; importing this imports numba, which takes half a second."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 64
"""Rows of which the squares are summed together; the cuts between threads lie on multiples of it."""
_CHUNK = 128
"""Columns between two looks ahead: a processor can wait for some dozen cache lines at a time."""
_LINE = 64
"""Bytes of a cache line."""
_AHEAD = 1024
"""Columns that rows are asked for ahead of time: the next row, or of narrow rows as many more."""


def _compiled(loop: Callable[..., Any]) -> Any:
    try:
        return njit(loop, nogil=True, error_model="numpy", cache=True)
    except RuntimeError:  # There is no folder that compiled code can be kept in.
        return njit(loop, nogil=True, error_model="numpy")


@intrinsic
def _prefetch(_: Any, plane: Any, row: Any, column: Any) -> Any:
    """Ask for the cache line of plane[row, column], which will be written; no more than a hint, wherever it points."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        array = context.make_array(kind)(context, builder, arguments[0])
        place = cgutils.get_item_pointer(context, builder, kind, array, list(arguments[1:]), wraparound=False)
        byte, number = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        hint = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        )
        # For writing, to be kept in the nearest cache, data and no code.
        builder.call(hint, [builder.bitcast(place, byte), *(ir.Constant(number, flag) for flag in (1, 3, 1))])
        return context.get_dummy_value()

    return types.void(plane, row, column), generate


@_compiled
def _bag(source: Any, index: Any, weights: Any, begin: int, end: int, out: Any) -> None:
    """out = Σ over the entries begin … end of weight·source row."""
    out[:] = 0
    for entry in range(begin, end):
        given, weight = source[index[entry]], weights[entry]
        for j in range(len(out)):
            out[j] += weight * given[j]


@_compiled
def _fetch(plane: Any, row: Any, begin: int, end: int, numbers: int) -> None:
    """Prefetch columns begin … end of a row; `numbers` of them fill a cache line."""
    for line in range((end - begin + numbers - 1) // numbers):
        _prefetch(plane, row, begin + line * numbers)


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
    own, ahead, numbers = len(sizes) > 1, max(1, _AHEAD // width), _LINE // 4
    for begin in range(first, last, BLOCK):
        of_block[:] = 0
        for row in range(begin, min(begin + BLOCK, last)):
            _bag(source, index, weights, offsets[row], offsets[row + 1], gradient)
            slot, later = rows[row], rows[min(row + ahead, last - 1)]
            p, m, v = values[slot], exp_avg[slot], exp_avg_sq[slot]
            size, small = (sizes[row], eps[row]) if own else (sizes[0], eps[0])
            for c in range(0, width, _CHUNK):
                end = min(c + _CHUNK, width)
                _fetch(values, later, c, end, numbers)
                _fetch(exp_avg, later, c, end, numbers)
                _fetch(exp_avg_sq, later, c, end, numbers)
                _step(
                    p[c:end], m[c:end], v[c:end], gradient[c:end], of_block[c:end], size, small,
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
    own, ahead, numbers = len(sizes) > 1, max(1, _AHEAD // width), _LINE // 4
    for begin in range(first, last, BLOCK):
        of_block[:] = 0
        for row in range(begin, min(begin + BLOCK, last)):
            _bag(source, index, weights, offsets[row], offsets[row + 1], gradient)
            slot, later = rows[row], rows[min(row + ahead, last - 1)]
            size, small = (sizes[row], eps[row]) if own else (sizes[0], eps[0])
            for c in range(0, width, _CHUNK):
                end = min(c + _CHUNK, width)
                _fetch(values, later, c, end, numbers)
                _fetch(exp_avg, later, c, end, 2 * numbers)
                _fetch(exp_avg_sq, later, c, end, 2 * numbers)
                mean, square = m[c:end], v[c:end]
                _widen(exp_avg[slot, c:end], mean)
                _widen(exp_avg_sq[slot, c:end], square)
                _step(
                    values[slot, c:end], mean, square, gradient[c:end], of_block[c:end], size, small,
                    scale, rest1, beta2, rest2,
                )  # fmt: skip
                _narrow(mean, square, exp_avg[slot, c:end], exp_avg_sq[slot, c:end], keys[row], first_column + c)
        squares[begin // BLOCK] = _total(of_block)
