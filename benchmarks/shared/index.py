"""Index files of random codes: no k-means is needed to merge or to search them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from shared.command import note


def write_parts(paths: Sequence[Path], rows: int, width: int, nlist: int, code_bytes: int) -> list[Path]:
    """An IVF index of `rows` product codes in as many files of stock faiss as `paths`, with consecutive ids."""
    random = np.random.default_rng(0)
    quantizer = faiss.IndexFlatL2(width)
    quantizer.add(random.standard_normal((nlist, width), dtype=np.float32))
    empty = faiss.IndexIVFPQ(quantizer, width, nlist, code_bytes, 8)
    faiss.copy_array_to_vector(random.standard_normal(256 * width, dtype=np.float32), empty.pq.centroids)
    empty.is_trained = True
    edges = np.linspace(0, rows, len(paths) + 1).astype(np.int64)
    for number, path in enumerate(paths):
        index: Any = faiss.clone_index(empty)
        first, count = int(edges[number]), int(edges[number + 1] - edges[number])
        sizes = random.multinomial(count, np.full(nlist, 1 / nlist))
        place = first
        for one, size in enumerate(sizes.tolist()):
            codes = random.integers(0, 256, (size, code_bytes), dtype=np.uint8)
            ids = np.arange(place, place + size, dtype=np.int64)
            index.invlists.add_entries(one, size, faiss.swig_ptr(ids), faiss.swig_ptr(codes))
            place += size
        index.ntotal = count
        faiss.write_index(index, str(path))
        note(f"part {number + 1} of {len(paths)} written")
    return list(paths)
