"""Weighted sums of rows and their derivatives, without a tensor that has one row for every read."""

from collections.abc import Iterator

import torch
from torch import Tensor

from distlm.kernels import choice

_BUFFER = 768 << 10
_BUFFER_DEVICE = 64 << 20
_BLOCK = 64


def rows_at_once(width: int, device: torch.device, rows: int = 1 << 62) -> int:
    """Of `rows` rows of `width` fp32 numbers those that are worked on together: a multiple of 64.

    On a processor a few such buffers fit into the cache that its threads share; on a GPU they hide the launches.
    """
    budget = _BUFFER * torch.get_num_threads() if device.type == "cpu" else _BUFFER_DEVICE
    return min(max(_BLOCK, budget // (4 * width) // _BLOCK * _BLOCK), -(-rows // _BLOCK) * _BLOCK)


def bag_sums(table: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Σ over the entries e of each bag of weights[e]·table[index[e]], in the order of the entries.

    table fp32 [N, d], index int32 [n], offsets int32 [B + 1] (bag b: entries offsets[b] to offsets[b + 1]), weights
    fp32 [n] → fp32 [B, d]. Each sum starts at 0 and adds one entry after the other, for every column alike: a column's
    bits depend neither on the other columns nor on the other bags.
    """
    out: Tensor = torch.ops.aten._embedding_bag_forward_only(
        table, index, offsets, False, 0, False, weights, include_last_offset=True
    )[0]
    return out


def token_sums(table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """table fp32 [K, d], slots int32 [T, A], weights fp32 [T, A] → Σ over A of weights·table[slots], fp32 [T, d]."""
    if choice.taken("lookup", table.device):
        from distlm.kernels import bags

        return bags.token_sums(table, slots, weights)
    tokens, reads = slots.shape
    offsets = torch.arange(0, tokens * reads + 1, reads, dtype=torch.int32, device=slots.device)
    return bag_sums(table, slots.flatten(), offsets, weights.flatten())


def score_gradients(table: Tensor, slots: Tensor, gradient: Tensor) -> Tensor:
    """⟨gradient[t], table[slots[t, a]]⟩: table fp32 [K, d], slots int32 [T, A], gradient fp32 [T, d] → fp32 [T, A]."""
    if choice.taken("weights", table.device):
        from distlm.kernels import bags

        return bags.score_gradients(table, slots, gradient)
    reads = slots.shape[1]
    # Rising slots: neighbouring rows share pages, and a row that several tokens read comes from the cache.
    rising, order = slots.flatten().sort()
    tokens = order.div(reads, rounding_mode="floor").int()
    out = torch.empty(rising.shape, device=gradient.device)
    out[order] = _products(table, rising, gradient.contiguous(), tokens)
    return out.view(slots.shape)


def _products(table: Tensor, rows: Tensor, gradient: Tensor, tokens: Tensor) -> Tensor:
    """⟨gradient[tokens[i]], table[rows[i]]⟩ → [n]."""
    fused = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
    if fused is None or table.device.type not in ("cpu", "cuda"):
        return products_by_pieces(table, rows, gradient, tokens)
    out: Tensor = fused(gradient, table, rows, tokens.new_zeros(1), tokens, 0)
    return out


def products_by_pieces(table: Tensor, rows: Tensor, gradient: Tensor, tokens: Tensor) -> Tensor:
    """What the fused operation gives, for devices without it; gathers 64 MiB at a time at most."""
    size = max(1, _BUFFER_DEVICE // (4 * table.shape[1]))
    pieces = zip(rows.split(size), tokens.split(size), strict=True)
    return torch.cat([(table[r] * gradient[t]).sum(1) for r, t in pieces])


def add_column_squares_(total: Tensor, x: Tensor) -> None:
    """total fp64 [d] += Σ over the rows of x, fp32 [n, d], of squares. Any cut of the rows into multiples of 64 gives
    the same bits, and so does any cut of the columns."""
    for block in x.split(_BLOCK):
        squares = block.double().square_()
        # By halves: torch's sum over rows takes another order for another number of columns.
        while len(squares) > 1:
            half = len(squares) // 2
            squares[:half] += squares[len(squares) - half :]
            squares = squares[: len(squares) - half]
        total += squares[0]


def wide(table: Tensor) -> Tensor:
    """The same memory, fp32 [K, d], as the widest numbers that d divides into: torch's index_copy_ copies number by
    number, and is three times faster with complex128."""
    columns = table.shape[1]
    dtype = torch.complex128 if columns % 4 == 0 else torch.complex64 if columns % 2 == 0 else torch.float32
    return table.view(dtype)


def pieces(length: int, size: int) -> Iterator[slice]:
    """0 … length in slices of `size`."""
    return (slice(first, min(first + size, length)) for first in range(0, length, size))
