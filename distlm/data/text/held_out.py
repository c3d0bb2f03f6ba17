"""Which documents of train are the valid and the test split, where a corpus has neither.

A document's place decides: a hash of its source's name and where it begins there, in [0, 1), below the share or not.
So any rank finds the same, whatever the others do, and a larger valid_share keeps the documents of a smaller one.
"""

from collections.abc import Mapping

import xxhash

_SEED = 1
"""Of the hash. Another one would split every corpus anew."""


def split_of(name: str, start: int, shares: Mapping[str, float]) -> str:
    """The split of a document that begins at `start` (byte or row) of a source; train unless a share takes it."""
    place = xxhash.xxh3_64_intdigest(f"{name} {start}".encode(), _SEED) / 2**64
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return "train"
