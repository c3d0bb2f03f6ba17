"""Adding keys to a trained index as plain faiss and as distlm does, and what differs."""

import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from distlm.datastore.reader import Datastore
from distlm.index.build.encode import Encoder
from distlm.index.factory import inverted_file
from distlm.index.layout import deserialise

CHUNK = 100_000
"""Keys that the recipe of the kNN-LM paper adds at once."""
Array = np.ndarray


def wide_keys(store: Path, rows: int, width: int) -> Array:
    """fp16 [rows, width]: states of width / D consecutive tokens side by side."""
    datastore = Datastore.open(store)
    side = width // datastore.width
    if side * datastore.width != width or datastore.rows < rows + side:
        sys.exit(f"{store}: {datastore.rows} keys of {datastore.width}: cannot make {rows} keys of {width}")
    states = []
    for shard in datastore.shards:
        states.append(np.asarray(datastore.keys(shard.index)[: rows + side], np.float16))
        if sum(map(len, states)) >= rows + side:
            break
    flat = np.concatenate(states)[: rows + side - 1]
    return np.lib.stride_tricks.sliding_window_view(flat, side, axis=0).transpose(0, 2, 1).reshape(rows, width)


def plain_add(trained: bytes, keys: Array) -> Any:
    """In chunks with ids, as the recipe adds."""
    index = deserialise(trained)
    for start in range(0, len(keys), CHUNK):
        chunk = keys[start : start + CHUNK].astype(np.float32)
        index.add_with_ids(chunk, np.arange(start, start + len(chunk)))
    return index


def our_add(trained: bytes, keys: Array, threads: int, store_keys: int) -> Any:
    """As `distlm index add` adds a shard of a store of `store_keys` keys."""
    index = deserialise(trained)
    with Encoder(index, threads, keys=store_keys) as encoder:
        for start in range(0, len(keys), encoder.batch):
            chunk = keys[start : start + encoder.batch].astype(np.float32)
            encoder.add(chunk, np.arange(start, start + len(chunk)))
    return index


def different(one: Any, other: Any) -> str:
    """How many keys lie in another list or have another code."""
    codes = []
    for index in (one, other):
        inner = inverted_file(index)
        rows = np.empty((inner.ntotal, inner.code_size + 1), np.int64)
        for number in range(inner.nlist):
            size = inner.invlists.list_size(number)
            if size:
                ids = faiss.rev_swig_ptr(inner.invlists.get_ids(number), size)
                own = faiss.rev_swig_ptr(inner.invlists.get_codes(number), size * inner.code_size)
                rows[ids, 0], rows[ids, 1:] = number, own.reshape(size, -1)
        codes.append(rows)
    moved = codes[0][:, 0] != codes[1][:, 0]
    changed = (codes[0][~moved, 1:] != codes[1][~moved, 1:]).sum()
    return f"{int(moved.sum())} of {len(moved)} keys in another list, {int(changed)} bytes of the others' codes"
