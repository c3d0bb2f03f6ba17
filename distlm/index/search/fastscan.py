"""Repacks a 4-bit product-quantised index in memory for faiss's FastScan, which looks 32 codes up at once in registers.

The file on disk stays a plain inverted file, since FastScan's blocks of 32 codes cannot be merged. Scanned as it lies,
a 4-bit index is the slowest of all (its codes are unpacked one by one); repacked it is the fastest.
"""

from typing import Any

from distlm.index.faiss_module import require_faiss

MOST_BYTES = 8 << 30
"""Largest repacked index. Fixed, not the memory that is free: ranks on other nodes must search the same way, because
FastScan rounds its tables to 8 bits and so finds slightly other neighbours."""
BLOCK_CODES = 32
"""Codes of a FastScan block; the last block of each list is filled up."""
ONE_QUERY_RESERVOIR = 11
"""faiss's `implem`: one query after another, the k best kept in a buffer. Grouping queries by list (12, 13) was no
faster at 8 to 16 lists a query, and heaps (10, 12) take twice as long at k = 1024."""


def packed_bytes(rows: int, nlist: int, code_size: int) -> int:
    """Most memory of a repacked index: codes and ids, and the filling of the last block of every list."""
    return rows * (code_size + 8) + nlist * BLOCK_CODES * code_size


def can_pack(inner: Any) -> bool:
    """Whether an inverted file has the codes that FastScan takes: product codes of 4 bits, for squared L2."""
    faiss = require_faiss()
    return type(inner) is faiss.IndexIVFPQ and inner.pq.nbits == 4 and inner.metric_type == faiss.METRIC_L2


def pack(inner: Any, rows: int, stacked: bool = False) -> Any | None:
    """A FastScan copy of a loaded IndexIVFPQ; None where it has other codes, the index is too large, or faiss refuses.

    rows: keys of the whole index, of which `inner` may hold a share: all ranks search the same way.
    stacked: its lists lie in several parts; they are then in memory twice while they are packed.
    The copy shares the centroids and the product quantiser's tables with `inner`, which it keeps alive.
    """
    faiss = require_faiss()
    if not can_pack(inner) or packed_bytes(rows, inner.nlist, inner.code_size) > MOST_BYTES:
        return None
    lists = inner.invlists
    if stacked:
        # faiss-cpu 1.15 crashes when it packs lists that are put together on demand.
        inner.replace_invlists(_in_memory(inner), True)
    try:
        packed = faiss.IndexIVFPQFastScan(inner)
    except RuntimeError:
        return None
    finally:
        if stacked:
            inner.replace_invlists(lists, False)
    packed.implem = ONE_QUERY_RESERVOIR
    packed.referenced_objects = [*getattr(packed, "referenced_objects", []), inner]
    return packed


def _in_memory(inner: Any) -> Any:
    """A copy of an index's lists, which whoever takes it owns."""
    faiss = require_faiss()
    lists = inner.invlists
    copy = faiss.ArrayInvertedLists(inner.nlist, inner.code_size)
    for number in range(inner.nlist):
        if size := lists.list_size(number):
            ids, codes = lists.get_ids(number), lists.get_codes(number)
            copy.add_entries(number, size, ids, codes)
            lists.release_ids(number, ids)
            lists.release_codes(number, codes)
    copy.this.disown()
    return copy
