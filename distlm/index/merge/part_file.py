"""One index file that faiss wrote, as a part of a merge: its trained state, the sizes of its lists, its ids."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distlm.errors import DistlmError
from distlm.index.factory import inverted_file, why_unmergeable
from distlm.index.faiss_module import require_faiss
from distlm.index.layout import Array, lists_header, read_list_sizes, serialise, set_count
from distlm.index.merge.copy import read_at
from distlm.index.selfcheck import open_mapped

READ_BYTES = 16 << 20
"""Codes and ids read at once while ids are checked."""
GLANCE = 64
"""Lists at whose ends ids are looked at first."""
LONG_LIST = 64 << 10
"""Lists of more bytes than this on average are not read whole for their ids."""


@dataclass(frozen=True)
class Part:
    """One input file."""

    path: Path
    state: bytes
    """The trained index without keys, as faiss writes it."""
    sizes: Array
    """Keys of each list, int64 [nlist]."""
    code_size: int
    header: int
    """Bytes before the first list."""

    @property
    def rows(self) -> int:
        """Keys."""
        return int(self.sizes.sum())


def open_part(path: Path) -> Part:
    """Read the trained state and the list sizes of a faiss file; nothing of its lists.

    Raises DistlmError for a file that faiss cannot read, that is cut, or whose type cannot be merged on disk.
    """
    faiss = require_faiss()
    if not path.is_file():
        raise DistlmError(f"{path}: no such file; name an index file that faiss wrote")
    index = open_mapped(path, faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    if reason := why_unmergeable(index):
        raise DistlmError(f"{path}: {reason}")
    inner = inverted_file(index)
    lists, code_size = inner.invlists, int(inner.code_size)
    if int(lists.code_size) != code_size:
        raise DistlmError(f"{path}: lists of {lists.code_size}-byte codes, the index has {code_size}-byte codes")
    sizes = np.array([lists.list_size(number) for number in range(inner.nlist)], np.int64)
    if not index.ntotal == inner.ntotal == sizes.sum():
        raise DistlmError(
            f"{path}: its lists hold {sizes.sum()} keys, its head says {index.ntotal}: faiss counts vectors with NaN, "
            "and puts them in no list (add the finite ones anew), or the file is damaged"
        )
    header = _header_bytes(path, sizes, code_size)
    # The number of lists that a search probes is a setting of the reader, no trained state.
    inner.nprobe = 1
    # Nor is the map from ids to places, with which faiss reconstructs and removes keys.
    inner.set_direct_map_type(faiss.DirectMap.NoMap)
    empty = faiss.ArrayInvertedLists(inner.nlist, code_size)
    # The index owns it from here on.
    empty.this.disown()
    inner.replace_invlists(empty, True)
    set_count(index, 0)
    return Part(path, serialise(index), sizes, code_size, header)


def open_like(first: Part, path: Path) -> Part:
    """The part in `path`, without its trained state, which is `first`'s. DistlmError naming what differs else."""
    part = open_part(path)
    if part.state != first.state:
        raise DistlmError(
            f"{part.path}: another trained index than {first.path} ({_difference(first, part)}); parts of one "
            "index are added to copies of one trained file: add it anew to that, or leave it out"
        )
    # Trained indexes are large, and parts many.
    return dataclasses.replace(part, state=b"")


def _header_bytes(path: Path, sizes: Array, code_size: int) -> int:
    """Bytes before the first list; DistlmError when the file does not end with its lists, or is cut."""
    body, size = int(sizes.sum()) * (code_size + 8), path.stat().st_size
    lead = len(lists_header(sizes, code_size))
    start = size - body - lead
    try:
        if start < 0:
            raise ValueError("the file ends early")
        with path.open("rb") as stream:
            stream.seek(start)
            if not np.array_equal(read_list_sizes(stream, len(sizes), code_size), sizes):
                raise ValueError("other list sizes than faiss reads")
    except ValueError as error:
        raise DistlmError(
            f"{path}: does not end with its inverted lists ({error}); it is cut, or its lists lie in another file: "
            "read it with faiss and write it as one"
        ) from error
    return start + lead


def _difference(first: Part, other: Part) -> str:
    """What differs between two trained indexes, in words."""
    faiss = require_faiss()
    a, b = (faiss.deserialize_index(np.frombuffer(part.state, np.uint8).copy(), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
            for part in (first, other))  # fmt: skip
    x, y = inverted_file(a), inverted_file(b)
    for what, of in (("type", lambda index, inner: (type(faiss.downcast_index(index)).__name__, type(inner).__name__)),
                     ("width", lambda index, inner: index.d), ("metric", lambda index, inner: inner.metric_type),
                     ("lists", lambda index, inner: inner.nlist), ("code size", lambda index, inner: inner.code_size),
                     ("by_residual", lambda index, inner: inner.by_residual)):  # fmt: skip
        mine, theirs = of(a, x), of(b, y)
        if mine != theirs:
            return f"{what} {theirs} instead of {mine}"
    if not np.array_equal(_centroids(x), _centroids(y)):
        return "other coarse centroids"
    if hasattr(x, "pq") and not np.array_equal(
        faiss.vector_to_array(x.pq.centroids), faiss.vector_to_array(y.pq.centroids)
    ):
        return "another product-quantiser codebook on the same centroids"
    if hasattr(x, "sq") and not np.array_equal(
        faiss.vector_to_array(x.sq.trained), faiss.vector_to_array(y.sq.trained)
    ):
        return "other scalar-quantiser ranges on the same centroids"
    if type(faiss.downcast_index(a)).__name__ == "IndexPreTransform":
        return "another transform (PCA, OPQ) or other settings"
    return "other settings"


def _centroids(inner: Any) -> Array:
    return np.asarray(inner.quantizer.reconstruct_n(0, inner.nlist))


def end_ids(part: Part) -> Array:
    """First and last id of some lists of a part, int64: about its least and greatest where it was added in order."""
    filled = np.flatnonzero(part.sizes)
    if not len(filled):
        return np.empty(0, np.int64)
    places = part.header + np.concatenate([[0], np.cumsum(part.sizes * (part.code_size + 8))])
    found = []
    with part.path.open("rb", buffering=0) as stream:
        for number in filled[np.unique(np.linspace(0, len(filled) - 1, GLANCE).astype(int))].tolist():
            stop = int(places[number + 1])
            for place in (stop - 8 * int(part.sizes[number]), stop - 8):
                found.append(os.pread(stream.fileno(), 8, place))
    return np.frombuffer(b"".join(found), "<i8")


def part_ids(part: Part) -> Iterator[Array]:
    """The ids of a part, list by list, int64; about READ_BYTES of the file at a time, of long lists the ids alone."""
    width = part.code_size
    ends = np.cumsum(part.sizes * (width + 8))
    first, held = 0, 0
    while first < len(part.sizes):
        last = max(first + 1, int(np.searchsorted(ends, held + READ_BYTES, side="right")))
        sizes, count = part.sizes[first:last], int(ends[last - 1]) - held
        starts = np.concatenate([[0], np.cumsum(sizes * (width + 8))[:-1]]) + sizes * width
        pairs = list(zip(starts.tolist(), (8 * sizes).tolist(), strict=True))
        place = part.header + held
        if count > LONG_LIST * len(pairs):
            yield from _long_lists(part.path, place, pairs)
        else:
            raw = np.frombuffer(read_at(part.path, place, count), np.uint8)
            yield np.concatenate([raw[start : start + size].view("<i8") for start, size in pairs])
        first, held = last, held + count


def _long_lists(path: Path, place: int, pairs: list[tuple[int, int]]) -> Iterator[Array]:
    """The ids at `place` + start of `pairs` (start, bytes), some lists at a time."""
    waiting: list[bytes] = []
    held = 0
    for start, size in pairs:
        for skip in range(0, size, READ_BYTES):
            waiting.append(read_at(path, place + start + skip, min(READ_BYTES, size - skip)))
            held += len(waiting[-1])
            if held >= READ_BYTES:
                yield np.frombuffer(b"".join(waiting), "<i8")
                waiting, held = [], 0
    if waiting:
        yield np.frombuffer(b"".join(waiting), "<i8")
