"""Dropout whose masks belong to rows: what is dropped of a row does not depend on the rows computed beside it.

So a micro-batch may be cut over any number of ranks. Masks come from a counter-based generator, a function of
(row's key, module's salt, position), the same on CPU and GPU, and are not kept for the backward pass by a generator's
state.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import xxhash
from torch import Tensor, nn

from distlm.models.dropout import apply_mask, dropout

_STEPS = 1 << 16
_LOW = 0xFFFFFFFF
_FIRST, _SECOND, _STRIDE = -0x395B586CA42E166B, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB
"""Odd 64-bit multipliers: those of splitmix64's finaliser (Steele et al. 2014) and the golden ratio."""


class Rows:
    """What a model's modules must know of the rows they are given; set for one forward pass."""

    keys: Tensor | None = None
    """int64 [B]: one number per row and update, from which its masks follow. None: no dropout."""
    mask: Tensor | None = None
    """bool [B, T]: tokens that are text (no padding)."""
    counted: Tensor | None = None
    """bool [B, T]: tokens whose reads count as use of a memory; None: as `mask`."""
    tokens: Tensor | None = None
    """int64 [n]: keys of those tokens that are scored, row by row, where dropout follows that is given them alone."""

    @contextmanager
    def set(
        self, keys: Tensor | None, mask: Tensor | None, counted: Tensor | None = None, tokens: Tensor | None = None
    ) -> Iterator[None]:
        """Within the block the model's modules see these rows."""
        self.keys, self.mask, self.counted, self.tokens = keys, mask, counted, tokens
        try:
            yield
        finally:
            self.keys = self.mask = self.counted = self.tokens = None

    def of_text(self) -> tuple[Tensor | None, Tensor | None]:
        """What a memory is given beside x: mask and counted."""
        return self.mask, self.counted


def row_keys(seed: int, update: int, rows: range) -> Tensor:
    """Keys of rows (numbered within an update): int64 [len(rows)]."""
    numbers = torch.arange(rows.start, rows.stop, dtype=torch.int64)
    return _mix(numbers * _STRIDE + (xxhash.xxh3_64_intdigest(f"{seed} {update}".encode()) >> 1))


def token_keys(keys: Tensor, length: int) -> Tensor:
    """Keys of the tokens of rows with these keys, int64 [B] → int64 [B, T]."""
    places = torch.arange(1, length + 1, dtype=torch.int64, device=keys.device).mul_(_STRIDE)
    return _mix(keys[:, None] + places)


def drop_with_keys(hidden: Tensor, p: float, keys: Tensor, salt: int) -> Tensor:
    """Each element times 0 with probability p, else 1 / (1 − p): hidden [B, ...] with keys int64 [B] → the same shape;
    p is rounded to 1/65536.

    One 64-bit number serves four elements. Memory: about four bytes per element beside mask and result.
    """
    kept = round((1 - p) * _STEPS)
    shape, each = hidden.shape, hidden.shape[1:].numel()
    words = torch.arange(1, (each + 3) // 4 + 1, dtype=torch.int64, device=keys.device).mul_(_STRIDE)
    numbers = _mix(words + _mix(keys ^ salt)[:, None])
    draws = numbers.view(torch.int16)[:, :each].reshape(shape)
    return apply_mask(hidden, torch.lt(draws, kept - _STEPS // 2).to(hidden.dtype), _STEPS / max(kept, 1))


def name_salt(name: str) -> int:
    """What tells the masks of one place in a model from those of the others."""
    return xxhash.xxh3_64_intdigest(name.encode()) >> 1


def drop_by_row(hidden: Tensor, p: float, rows: Rows, salt: int) -> Tensor:
    """Dropout in training: hidden [B, ...] → the same shape. ValueError outside Rows.set."""
    if rows.keys is None:
        raise ValueError("dropout without Rows.set: the rows of this pass have no keys")
    rows_there = len(rows.keys)
    # Some models compute on all tokens in one.
    shape = torch.Size([rows_there, len(hidden) // rows_there, *hidden.shape[1:]])
    return drop_with_keys(hidden.view(shape), p, rows.keys, salt).reshape(hidden.shape)


class Noise:
    """Dropout in a model that may be trained in pieces of a micro-batch: by row where it is given `rows`, else from
    torch's global generator (distlm.models.dropout)."""

    def __init__(self, rows: Rows | None = None, name: str = "") -> None:
        """`name` tells places in the model apart: their masks are unrelated."""
        self.rows, self.name = rows, name

    def __call__(self, hidden: Tensor, p: float, training: bool, place: str) -> Tensor:
        """hidden [B, ...] → the same shape."""
        if self.rows is None:
            return dropout(hidden, p, training)
        return drop_by_row(hidden, p, self.rows, self._salt(place)) if training and p > 0 else hidden

    def of_tokens(self, hidden: Tensor, p: float, training: bool, place: str, chosen: Tensor | None = None) -> Tensor:
        """hidden [n, D] of the scored tokens, or of those among them that `chosen`, int64 [n], names → the same."""
        if self.rows is None:
            return dropout(hidden, p, training)
        if not training or p == 0:
            return hidden
        keys = self.rows.tokens
        if keys is None:
            raise ValueError("dropout without Rows.set: the tokens of this pass have no keys")
        keys = keys if chosen is None else keys[chosen]
        return drop_with_keys(hidden, p, keys, self._salt(place))

    def _salt(self, place: str) -> int:
        return name_salt(f"{self.name}.{place}")


def memory_dropout(rows: Rows, layer: int) -> Callable[[Tensor, float, str], Tensor]:
    """Dropout inside the memory of a layer, by row: what ProductKeyMemory calls as (tensor, p, place)."""
    return lambda hidden, p, place: drop_by_row(hidden, p, rows, name_salt(f"memory.{layer}.{place}"))


class RowDropout(nn.Module):
    """nn.Dropout with masks by row. `name` tells modules apart: their masks are unrelated."""

    def __init__(self, p: float, rows: Rows, name: str) -> None:
        super().__init__()
        self.p, self.rows = p, rows
        self.salt = name_salt(name)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, ...] → the same shape."""
        return drop_by_row(hidden, self.p, self.rows, self.salt) if self.training and self.p > 0 else hidden

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _mix(numbers: Tensor) -> Tensor:
    """A bijection of 64-bit integers in which every bit of the result depends on every bit given; in place."""
    for factor in (_FIRST, _SECOND):
        numbers ^= (numbers >> 32).bitwise_and_(_LOW)
        numbers *= factor
    numbers ^= (numbers >> 32).bitwise_and_(_LOW)
    return numbers
