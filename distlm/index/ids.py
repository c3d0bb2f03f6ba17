"""Checks that the ids of several files number a store's keys: none twice, none missing. One bit for each number."""

import numpy as np

from distlm.errors import DistlmError
from distlm.index.layout import Array

SPARE = 64
"""Ids may reach this many times the number of keys (with gaps); a bit for each number would be too much beyond."""
LEAST = 1 << 20


class IdBits:
    """The ids that were seen. Memory: one bit for each number up to the largest that is allowed."""

    def __init__(self, rows: int, gaps: bool) -> None:
        """rows: keys of all files; gaps: numbers may be left out."""
        self.rows = rows
        self.limit = max(SPARE * rows, LEAST) if gaps else rows
        """Ids are below this."""
        self._bits = np.zeros(-(-self.limit // 8), np.uint8)

    def add(self, ids: Array) -> int | None:
        """Mark `ids` int64 [n], each from 0 to below `limit`; one that was marked before, or comes twice, if any."""
        ids = np.sort(ids)
        twice = np.flatnonzero(ids[1:] == ids[:-1])
        if len(twice):
            return int(ids[twice[0]])
        words, bits = ids >> 3, np.left_shift(np.uint8(1), (ids & 7).astype(np.uint8))
        starts = np.flatnonzero(np.concatenate([[True], words[1:] != words[:-1]]))
        return self._mark(words[starts], np.bitwise_or.reduceat(bits, starts)) if len(ids) else None

    def join(self, others: list["IdBits"]) -> int | None:
        """Mark what others saw; an id that two of them saw, if any."""
        for other in others:
            places = np.flatnonzero(other._bits)
            again = self._mark(places, other._bits[places])
            if again is not None:
                return again
        return None

    def missing(self) -> int | None:
        """The first number below `rows` that was not seen, if any."""
        words = np.flatnonzero(self._bits[: -(-self.rows // 8)] != 0xFF)
        number = _lowest(8 * int(words[0]), ~int(self._bits[words[0]])) if len(words) else self.rows
        return number if number < self.rows else None

    def _mark(self, places: Array, masks: Array) -> int | None:
        both = self._bits[places] & masks
        again = np.flatnonzero(both)
        if len(again):
            return _lowest(8 * int(places[again[0]]), int(both[again[0]]))
        self._bits[places] |= masks
        return None


def require_range(ids: Array, rows: int, name: str, shifted: bool, bits: IdBits) -> None:
    """DistlmError for ids int64 [n] of the file `name`, as they lie there, that cannot be numbers of keys.

    rows: keys of the file. shifted: they are to be the file's own, from 0 on.
    """
    if not len(ids):
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0:
        raise DistlmError(f"{name}: has the id {least}; ids number keys from 0")
    if shifted and most >= rows:
        raise DistlmError(
            f"{name}: --ids shift is for files that number their own {rows} keys from 0, and this one has the id "
            f"{most}; use --ids keep if the ids are those of the whole store"
        )
    if not shifted and most >= bits.limit:
        raise DistlmError(
            f"{name}: has the id {most} among {bits.rows} keys in all; a file is missing, or its ids begin elsewhere "
            "(--gaps: numbers may be left out)"
        )


def _lowest(start: int, mask: int) -> int:
    """`start` and the place of the lowest bit of `mask`."""
    return start + (mask & -mask).bit_length() - 1
