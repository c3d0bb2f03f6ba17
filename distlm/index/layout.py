"""Files of an index folder, and the bytes of a faiss inverted file.

INDEX/
  choice.json                       what index.factory=auto stands for, where that was asked for
  template.index  template.json     trained, empty; template.json last
  parts/part-00000.index  .json     one per datastore shard, global ids; the sidecar last
  merged.index  index.json          one stock faiss file; index.json last
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from distlm.errors import DistlmError
from distlm.index.factory import inverted_file
from distlm.index.faiss_module import require_faiss

Array = NDArray[Any]
SUMS = 4096
"""Checksums of the lists of a part, at most."""


@dataclass(frozen=True)
class IndexFolder:
    """Paths of an index."""

    root: Path

    @property
    def choice_json(self) -> Path:
        """What index.factory=auto stands for here; written before training."""
        return self.root / "choice.json"

    @property
    def template(self) -> Path:
        """Trained index without keys."""
        return self.root / "template.index"

    @property
    def template_json(self) -> Path:
        """What the template is; written last."""
        return self.root / "template.json"

    @property
    def parts(self) -> Path:
        """Folder of parts."""
        return self.root / "parts"

    def part(self, shard: int) -> Path:
        """Part of a datastore shard."""
        return self.parts / f"part-{shard:05d}.index"

    def part_json(self, shard: int) -> Path:
        """Sidecar of a part; written after it."""
        return self.parts / f"part-{shard:05d}.json"

    @property
    def merged(self) -> Path:
        """The whole index, one stock faiss file."""
        return self.root / "merged.index"

    @property
    def merging(self) -> Path:
        """The merged file while ranks write into it."""
        return self.root / ".merged.index.tmp"

    @property
    def index_json(self) -> Path:
        """What the merged index is; written last."""
        return self.root / "index.json"


def serialise(index: Any) -> bytes:
    """An index as the bytes that faiss.write_index would write."""
    return bytes(require_faiss().serialize_index(index).tobytes())


def deserialise(data: bytes) -> Any:
    """The index of `serialise`, without the precomputed table of IVFPQ (nlist × M × 1 KiB that only search uses)."""
    faiss = require_faiss()
    array = np.frombuffer(data, dtype=np.uint8).copy()
    return faiss.deserialize_index(array, faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)


def set_count(index: Any, rows: int) -> None:
    """Set ntotal of an index and of the inverted file inside it, without touching the lists."""
    index.ntotal = rows
    inverted_file(index).ntotal = rows


class Header:
    """Everything of a faiss file before its inverted lists: for one template it differs only in ntotal."""

    def __init__(self, template: bytes) -> None:
        """`template`: the bytes of a trained index without keys.

        Raises DistlmError when its inverted lists are not the end of the file.
        """
        self._index = deserialise(template)
        inner = inverted_file(self._index)
        self.nlist: int = inner.nlist
        self.code_size: int = inner.code_size
        self._tail = lists_header(np.zeros(self.nlist, np.int64), self.code_size)
        if self._index.ntotal != 0 or not template.endswith(self._tail):
            raise DistlmError(
                f"{type(inner).__name__}: this faiss does not end its file with inverted lists, so parts cannot be "
                "merged; use IVF…,PQ…, IVF…,SQ8 or IVF…,Flat"
            )

    def bytes(self, rows: int) -> bytes:
        """The header of an index of this template with `rows` keys."""
        set_count(self._index, rows)
        data = serialise(self._index)
        set_count(self._index, 0)
        return data[: -len(self._tail)]


def group_lists(nlist: int) -> int:
    """Lists that share one checksum in a part's sidecar; 1 in an index of up to SUMS lists."""
    return -(-nlist // SUMS)


def list_sums(index: Any) -> str:
    """xxh3-64 of each group of lists of a faiss index, of their codes and ids in the file's order: 16 hex digits each.

    By these a part is checked while it is merged, list by list and by several ranks, which one sum of all does
    not allow.
    """
    faiss, inner = require_faiss(), inverted_file(index)
    lists, step, sums = inner.invlists, group_lists(inner.nlist), []
    for first in range(0, inner.nlist, step):
        digest = xxhash.xxh3_64()
        for number in range(first, min(first + step, inner.nlist)):
            if size := lists.list_size(number):
                digest.update(faiss.rev_swig_ptr(lists.get_codes(number), size * inner.code_size).data)
                digest.update(faiss.rev_swig_ptr(lists.get_ids(number), size).data)
        sums.append(digest.hexdigest())
    return "".join(sums)


def lists_header(sizes: Array, code_size: int) -> bytes:
    """faiss's ArrayInvertedLists header of lists with `sizes` [nlist] keys: full when over half are non-empty."""
    nlist = len(sizes)
    filled = np.flatnonzero(sizes)
    if len(filled) > nlist // 2:
        kind, numbers = b"full", sizes
    else:
        kind, numbers = b"sprs", np.stack([filled, sizes[filled]], axis=1).ravel()
    shape = np.array([nlist, code_size], "<u8").tobytes()
    return b"ilar" + shape + kind + np.array([len(numbers)], "<u8").tobytes() + numbers.astype("<u8").tobytes()


def read_list_sizes(stream: BinaryIO, nlist: int, code_size: int) -> Array:
    """List sizes int64 [nlist] from a stream at its inverted lists. Raises ValueError when they are something else."""
    name = stream.read(4)
    shape = np.frombuffer(_exactly(stream, 16), "<u8")
    if name != b"ilar" or tuple(shape) != (nlist, code_size):
        raise ValueError(f"inverted lists {name!r} {shape.tolist()}, expected {nlist} lists of {code_size}-byte codes")
    kind = stream.read(4)
    count = int(np.frombuffer(_exactly(stream, 8), "<u8")[0])
    if count > 2 * nlist:
        raise ValueError(f"{count} list sizes, expected {nlist}")
    numbers = np.frombuffer(_exactly(stream, 8 * count), "<u8").astype(np.int64)
    if kind == b"full" and count == nlist:
        return numbers
    sizes = np.zeros(nlist, np.int64)
    if kind != b"sprs" or count % 2 or (count and not 0 <= numbers[::2].min() <= numbers[::2].max() < nlist):
        raise ValueError(f"list sizes of kind {kind!r}")
    sizes[numbers[::2]] = numbers[1::2]
    return sizes


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise ValueError("the file ends early")
    return data
