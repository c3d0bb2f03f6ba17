"""Checks a merged index against the store: sampled keys must lie in it where and as the template encodes them."""

from pathlib import Path
from typing import Any

import numpy as np

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.build.encode import Encoder
from distlm.index.factory import inverted_file
from distlm.index.faiss_module import for_faiss, require_faiss
from distlm.index.keys import gather_keys
from distlm.index.layout import Array
from distlm.system_errors import refuse

SAMPLE = 64
NEIGHBOURS = 64
LEAST_STORED = 0.9
"""Fewer sampled keys than this in their place with their codes is an error. Not 1: another CPU may break a tie between
two centroids the other way."""


def open_mapped(path: Path, flags: int = 0) -> Any:
    """A faiss file memory-mapped for reading. Raises DistlmError when faiss cannot read it."""
    faiss = require_faiss()
    try:
        return faiss.read_index(for_faiss(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY | flags)
    except RuntimeError as error:
        refuse(error, path)
        reason = str(error).rpartition("Error: ")[2].strip()
        raise DistlmError(f"{path}: not a readable faiss index ({reason}); run `distlm index build` again") from error


def check_index(index: Any, path: Path, datastore: Datastore, seed: int) -> float:
    """The share of sampled keys that find their own row among 64 neighbours in its own list.

    index: of faiss, opened from `path`. Raises DistlmError when it does not hold as many keys as the store, or the
    sampled rows are not in it under their own numbers with the codes of their own keys.
    """
    inner = inverted_file(index)
    held = int(inner.invlists.compute_ntotal())
    if not index.ntotal == inner.ntotal == held == datastore.rows:
        raise DistlmError(f"{path}: holds {held} keys (ntotal {index.ntotal}), the datastore {datastore.rows}")
    random = np.random.Generator(np.random.Philox(key=np.array([seed, datastore.rows], np.uint64)))
    rows = np.sort(random.choice(datastore.rows, min(SAMPLE, datastore.rows), replace=False))
    keys = gather_keys(datastore, rows)
    with Encoder(index) as encoder:
        codes = encoder.encode(keys)
    stored = np.mean([_is_stored(index, inner, row, code) for row, code in zip(rows, codes, strict=True)])
    if stored < LEAST_STORED:
        raise DistlmError(
            f"{path}: {100 * (1 - stored):.0f} % of {len(rows)} sampled rows are not in their list with the codes of "
            "their keys; the index does not belong to this datastore: remove the index folder and build it again"
        )
    # A key lies in the first list it probes; more lists would only map more of the file into memory.
    inner.nprobe = 1
    _, ids = index.search(keys, min(NEIGHBOURS, datastore.rows))
    return float((ids == rows[:, None]).any(axis=1).mean())


def _is_stored(index: Any, inner: Any, row: int, code: Array) -> bool:
    """Whether list `code[:c]` (c bytes of list number) holds id `row` once, with code `code[c:]` or one next to it."""
    faiss = require_faiss()
    coarse = inner.coarse_code_size()
    number = int.from_bytes(code[:coarse].tobytes(), "little")
    lists = inner.invlists
    size = lists.list_size(number)
    if not size:
        return False
    # Lists of several parts are copied together for a caller, who gives them back.
    ids = lists.get_ids(number)
    found = np.flatnonzero(faiss.rev_swig_ptr(ids, size) == row)
    lists.release_ids(number, ids)
    if len(found) != 1:
        return False
    codes = lists.get_codes(number)
    own = faiss.rev_swig_ptr(codes, size * inner.code_size).reshape(size, -1)[found[0]].copy()
    lists.release_codes(number, codes)
    there = np.concatenate([code[:coarse], own])
    if (there == code).all():
        return True
    # Behind a transform the last bits follow a key's place in its block: compare what the codes stand for.
    stored, expected = index.sa_decode(np.stack([there, code])).astype(np.float64)
    return bool(((stored - expected) ** 2).sum() <= 1e-3 * (expected**2).sum())
