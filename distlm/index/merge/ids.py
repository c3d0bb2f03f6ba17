"""Checks that the ids of several files number a store's keys: none twice, none missing. One bit for each number."""

from collections.abc import Iterable

import numpy as np

from distlm.errors import DistlmError
from distlm.index.layout import Array
from distlm.runtime.ranks.comm import Comm

SPARE = 64
"""Ids may reach this many times the number of keys (with gaps); a bit for each number would be too much beyond."""
LEAST = 1 << 20
GATHERED_BYTES, LEAST_PIECE = 64 << 20, 64 << 10
"""Bits of all ranks that rank 0 receives at once, and the least that a rank sends."""
COUNTED = 16 << 20
"""Bytes whose bits are counted at once."""
WINDOW, SPARSE = 64 << 20, 64
"""Largest range of ids that is marked in bytes: so many, and so many times the ids."""


class IdBits:
    """The ids that were seen. Memory: one bit for each key, or each number up to the largest id where that is more."""

    def __init__(self, rows: int, gaps: bool) -> None:
        """rows: keys of all files; gaps: numbers may be left out."""
        self.rows, self.gaps = rows, gaps
        self.limit = max(SPARE * rows, LEAST) if gaps else rows
        """Ids are below this."""
        self._bits = np.zeros(-(-rows // 8), np.uint8)

    def add(self, ids: Array) -> None:
        """Mark `ids` int64 [n], each from 0 to below `limit`."""
        if not len(ids):
            return
        low, high = int(ids.min()) >> 3 << 3, int(ids.max()) + 1
        self._reserve(-(-high // 8))
        if high - low > min(WINDOW, SPARSE * len(ids)):
            np.bitwise_or.at(self._bits, ids >> 3, _masks(ids))
            return
        # Ids of one part lie close together: whole bytes first, eight times as fast as single bits.
        seen = np.zeros(high - low, bool)
        seen[ids - low] = True
        packed = np.packbits(seen, bitorder="little")
        self._bits[low >> 3 : (low >> 3) + len(packed)] |= packed

    def gather(self, comm: Comm) -> None:
        """Mark on rank 0 what every rank saw. Collective. Memory of rank 0 besides the bits: GATHERED_BYTES, or
        LEAST_PIECE for each rank."""
        step = max(LEAST_PIECE, GATHERED_BYTES // comm.size)
        for start in range(0, max(comm.allgather(len(self._bits))), step):
            piece = self._bits[start : start + step]
            # A rank sees the ids of its files, a small range of all: most pieces are empty.
            for other in (comm.gather(piece if piece.any() else None) or [])[1:]:
                if other is not None:
                    self._reserve(start + len(other))
                    self._bits[start : start + len(other)] |= other

    def _reserve(self, count: int) -> None:
        """Room for `count` bytes of bits."""
        if count > len(self._bits):
            # Twice as many, so that few are copied; those that are not written take no memory.
            more = np.zeros(min(max(count, 2 * len(self._bits)), -(-self.limit // 8)), np.uint8)
            more[: len(self._bits)] = self._bits
            self._bits = more

    def count(self) -> int:
        """Different ids that were seen: fewer than were added when some came twice."""
        pieces = (self._bits[start : start + COUNTED] for start in range(0, len(self._bits), COUNTED))
        return sum(int(np.bitwise_count(piece).sum(dtype=np.int64)) for piece in pieces)

    def first_again(self, pieces: Iterable[Array]) -> int | None:
        """The first id of `pieces`, each int64 [n], that comes twice, starting from none seen."""
        self._bits[:] = 0
        for ids in pieces:
            self._reserve(int(ids.max(initial=0)) // 8 + 1)
            known = np.flatnonzero(self._bits[ids >> 3] & _masks(ids))
            if len(known):
                return int(ids[known[0]])
            rising = np.sort(ids)
            twice = np.flatnonzero(rising[1:] == rising[:-1])
            if len(twice):
                return int(rising[twice[0]])
            self.add(ids)
        return None

    def missing(self) -> int | None:
        """The first number below `rows` that was not seen, if any."""
        words = np.flatnonzero(self._bits[: -(-self.rows // 8)] != 0xFF)
        free = ~int(self._bits[words[0]]) & 0xFF if len(words) else 0
        number = 8 * int(words[0]) + (free & -free).bit_length() - 1 if free else self.rows
        return number if number < self.rows else None


def _masks(ids: Array) -> Array:
    """The bit of each id in its byte, uint8 [n]."""
    return np.left_shift(np.uint8(1), (ids & 7).astype(np.uint8))


def require_range(ids: Array, rows: int, name: str, shifted: bool, bits: IdBits) -> int:
    """The least of ids int64 [n], n > 0, as they lie in the file `name`; DistlmError when they cannot number keys.

    rows: keys of the file. shifted: they are to be the file's own, from 0 on.
    """
    least, most = int(ids.min()), int(ids.max())
    if least < 0:
        raise DistlmError(f"{name}: has the id {least}; ids number keys from 0")
    if shifted and most >= rows:
        raise DistlmError(
            f"{name}: --ids shift is for files that number their own {rows} keys from 0, and this one has the id "
            f"{most}; use --ids keep if the ids are those of the whole store"
        )
    if not shifted and most >= bits.limit:
        mend = f"with --gaps at most {bits.limit - 1}" if bits.gaps else "--gaps: numbers may be left out"
        raise DistlmError(
            f"{name}: has the id {most} among {bits.rows} keys in all; a file is missing, or its ids begin elsewhere "
            f"({mend})"
        )
    return least
