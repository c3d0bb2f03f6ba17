"""Normal numbers that are a pure function of (seed, layer, row, column), so that any part of a table can be made alone.

Integer hashing, one table look-up and single IEEE additions and products: no logarithm, no cosine, no fused operation.
So the bits are the same for every cut of the table, on every processor and device.
"""

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

_GOLDEN, _MIX1, _MIX2 = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_WORD = (1 << 32) - 1
_CELL_BITS = 6
_NUMBERS = 1 << 17
"""Numbers made at a time: their int64 buffers stay in a processor's cache."""


def normal_(out: Tensor, deviation: float, seed: int, layer: int, first_column: int) -> None:
    """Fill out, fp32 [K, d], with N(0, deviation²): row r and column c get the number of (r, first_column + c).

    A row's numbers are a SplitMix64 sequence (Steele et al. 2014) that starts at a hash of (seed, layer, row). Each of
    its 64-bit words becomes a sign and a uniform number in (0, 1/2], and that a normal one by its quantile function,
    linear between points 1/64 of an octave apart: within 1e-4 of the true quantile.
    """
    device = out.device
    quantiles, slopes = (table.to(device) for table in _quantiles())
    start = _mix(torch.tensor([seed], dtype=torch.int64).mul_(_GOLDEN).add_(layer))
    rows_at_once = max(1, _NUMBERS // out.shape[1])
    columns = torch.arange(first_column + 1, first_column + out.shape[1] + 1, device=device).mul_(_GOLDEN)
    for first in range(0, len(out), rows_at_once):
        part = out[first : first + rows_at_once]
        rows = torch.arange(first, first + len(part), device=device).mul_(_GOLDEN).add_(int(start))
        words = _mix(_mix(rows)[:, None] + columns)
        negative = words < 0
        # 52 bits, from 1: the exponent of the fp64 number is the octave, its mantissa the place in it.
        bits = words.bitwise_and_((1 << 52) - 1).add_(1).double().view(torch.int64)
        shift = 52 - _CELL_BITS
        cell = (bits >> shift).sub_(1023 << _CELL_BITS)
        place = bits.bitwise_and_((1 << shift) - 1).double().mul_(2.0**-shift)
        number = place.mul_(slopes.take(cell)).add_(quantiles.take(cell)).mul_(deviation)
        part.copy_(torch.where(negative, number, -number))


def rounding_keys(rows: Tensor, layer: int, update: int) -> Tensor:
    """int64 [n] of 32 bits: what the noise of `to_bf16` depends on beside the column, for rows (slots) int64 [n]."""
    start = _mix(torch.tensor([update], dtype=torch.int64).mul_(_GOLDEN).add_(layer))
    return _mix((rows * _GOLDEN).add_(int(start))).bitwise_and_(_WORD)


def to_bf16(m: Tensor, v: Tensor, keys: Tensor, first_column: int) -> tuple[Tensor, Tensor]:
    """Two planes fp32 [n, d] in bf16, rounded up or down at random, so that the mean of many roundings is the number.

    A number between two of bf16 goes to the upper one where 16 bits of noise exceed what is missing to it. The noise of
    column c, first_column on, is a hash of (key, c), MurmurHash3's last steps: the lower half for m, the upper for v.
    """
    columns = torch.arange(first_column, first_column + m.shape[1], device=m.device) * 0x9E3779B1
    noise = (columns & _WORD) ^ keys[:, None]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        noise = (noise ^ (noise >> shift)) * factor & _WORD
    noise ^= noise >> 16
    halves = noise & 0xFFFF, noise >> 16
    return tuple(  # type: ignore[return-value]
        ((x.view(torch.int32).long() + half) >> 16).short().view(torch.bfloat16)
        for x, half in zip((m, v), halves, strict=True)
    )


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place; int64, the shifts are of unsigned numbers."""
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


@cache
def _quantiles() -> tuple[Tensor, Tensor]:
    """Quantiles (≤ 0) at the start of each cell of (2⁻⁵³, 1/2], and their rise to the next cell's; fp64 [cells]."""
    cells = 1 << _CELL_BITS
    at = [2.0 ** (octave - 53) * (1 + cell / cells) for octave in range(53) for cell in range(cells)]
    # Rounded, so that a library's last bit of log or sqrt does not show.
    points = torch.tensor([round(NormalDist().inv_cdf(p) * 2**32) / 2**32 for p in at[: 52 * cells + 1]]).double()
    return points, torch.cat([points.diff(), torch.zeros(1, dtype=torch.float64)])
