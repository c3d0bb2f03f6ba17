"""Factories that are worth measuring for a store: codes, and numbers of lists in units of √rows.

A query that reads P of m·√N lists compares itself with P·√N / m codes and finds its lists among m·√N centroids: at
equal m both grow as √N, so that stores of different sizes are alike (extrapolate.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

from distlm.index.factory import KEYS_PER_LIST

RABITQ_BYTES = 8
"""Of a RaBitQ code besides a bit for each number."""
MULTIPLES = (1, 2, 4, 8, 16)
"""Lists that are tried, over √rows."""
BASE = 4
"""The one at which codes are compared."""
HNSW_FROM = 16
"""From this multiple on the lists are also found by a graph of their centroids."""
HNSW = "_HNSW32"
LEAST_KEYS_PER_LIST = 10
"""Keys that train a list of a sample here. Fewer than a finished index is given: recall is then a little too low."""
_LISTS = re.compile(r"IVF\d+")


@dataclass(frozen=True)
class Proposal:
    """A factory, as the whole store would have it and as a sample of it has."""

    factory: str
    """With the lists of the whole store."""
    lists: int
    """Of the whole store."""
    rows: int
    """Keys of the whole store."""

    def at(self, keys: int) -> str:
        """The factory for a sample of `keys`: with all the lists where these can be trained, else with so many that
        they are the same multiple of √keys."""
        if self.lists * KEYS_PER_LIST <= keys or keys >= self.rows:
            return self.factory
        return with_lists(self.factory, max(1, round(self.lists * sqrt(keys / self.rows))))


def with_lists(factory: str, lists: int) -> str:
    """The same factory with another number of lists."""
    return _LISTS.sub(f"IVF{lists}", factory)


def asked_for(factory: str, rows: int) -> Proposal:
    """A factory that somebody named."""
    found = _LISTS.search(factory)
    return Proposal(factory, int(found[0].removeprefix("IVF")) if found else 1, rows)


def code_proposals(width: int, rows: int, sample: int) -> list[Proposal]:
    """Codes for keys of `width` values at BASE·√rows lists: product codes of 8 and 4 bits, 4, 6 and 8-bit scalars whole
    and behind a PCA to an eighth, a quarter and half of the width, RaBitQ behind one to a quarter, half, all of it, and
    to what fits the bytes of the product codes. RaBitQ wants its numbers alike: its PCA ends in a random rotation."""
    product = max(1, width // 16)
    same_bytes = 8 * (product - RABITQ_BYTES)
    eighth, quarter, half = (max(4, width // share) for share in (8, 4, 2))
    codes = [
        f"IVF1,PQ{product}", f"IVF1,PQ{2 * product}x4", "IVF1,SQ4", "IVF1,SQ6", "IVF1,SQ8",
        f"PCA{eighth},IVF1,SQ4", f"PCA{eighth},IVF1,SQ6", f"PCA{eighth},IVF1,SQ8",
        f"PCA{quarter},IVF1,SQ4", f"PCA{quarter},IVF1,SQ6", f"PCA{quarter},IVF1,SQ8",
        f"PCAR{quarter},IVF1,RaBitQ", f"PCAR{half},IVF1,RaBitQ", f"PCAR{width},IVF1,RaBitQ", f"PCA{half},IVF1,SQ4",
    ]  # fmt: skip
    if 0 < same_bytes < width:
        codes.append(f"PCAR{same_bytes},IVF1,RaBitQ")
    codes = list(dict.fromkeys(codes))
    lists = lists_of(BASE, rows, sample)
    return [Proposal(with_lists(code, lists), lists, rows) for code in codes]


def list_proposals(codes: Sequence[Proposal], rows: int, keys: Sequence[int], sample: int) -> list[Proposal]:
    """The same codes with fewer and more lists, as far as the smallest sample of `keys`, and index.sample, can train
    them; with many also found by HNSW."""
    found = []
    for code in codes:
        for multiple in MULTIPLES:
            if (lists := lists_of(multiple, rows, sample)) == code.lists:
                continue
            if LEAST_KEYS_PER_LIST * multiple > sqrt(min(keys)):
                break
            more = replace(code, factory=with_lists(code.factory, lists), lists=lists)
            found.append(more)
            if multiple >= HNSW_FROM:
                found.append(replace(more, factory=more.factory.replace(f"IVF{lists}", f"IVF{lists}{HNSW}")))
    return list(dict.fromkeys(found))


def lists_of(multiple: float, rows: int, sample: int) -> int:
    """The power of two next to `multiple`·√rows; at most what so many training keys can train."""
    most = max(1, min(rows, sample) // KEYS_PER_LIST)
    wanted = max(1.0, multiple * sqrt(rows))
    return min(1 << round_log2(wanted), 1 << (most.bit_length() - 1))


def round_log2(number: float) -> int:
    """The whole number next to log₂."""
    low = int(number).bit_length() - 1
    return low + (number / (1 << low) > sqrt(2))
