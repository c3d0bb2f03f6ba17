"""Which documents of train are the valid and the test split, where a corpus has neither.

A document's place decides: a hash of its source's name and its number there, as a fraction in [0, 1), is below the
share or not. So any rank finds the same, whatever the others do; a text is split alike in any format that gives its
documents the same numbers (docs/text.md); and a larger valid_share keeps the documents of a smaller one.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath

import xxhash

from distlm.data.text.packed import packing

_SEED = 1
"""Of the hash. Another one would split every corpus anew."""


def stem_of(name: str) -> str:
    """A source's name without what its format adds."""
    return str(PurePosixPath(name.removesuffix(packing(name))).with_suffix(""))


def split_of(stem: str, number: int, shares: Mapping[str, float]) -> str:
    """The split that document `number` of a source (from 0) goes to: train unless a share takes it."""
    place = xxhash.xxh3_64_intdigest(f"{stem} {number}".encode(), _SEED) / 2**64
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return "train"
