"""`knn.scan=gpu`: what faiss-gpu finds in lists of product codes, beside faiss on the processor."""

import time
from typing import Any

import faiss
import numpy as np

from distlm.errors import DistlmError
from distlm.index.search.gpu import GpuLists, check_agreement
from gpu.part import Outcome, Place

ROWS, WIDTH, QUERIES, K, NPROBE = 262_144, 128, 4096, 1024, 32


def run(place: Place) -> Outcome:
    """Neighbours must be those of the processor; queries a second of both."""
    if not hasattr(faiss, "StandardGpuResources"):
        return Outcome(skipped="not installed: faiss-gpu (there is faiss-cpu)")
    if not place.is_gpu:
        return Outcome(skipped="faiss-gpu needs a GPU")
    random = np.random.default_rng(0)
    keys, queries = (random.standard_normal((count, WIDTH), np.float32) for count in (ROWS, QUERIES))
    index: Any = faiss.index_factory(WIDTH, "IVF1024,PQ32")
    index.train(keys[:65_536])
    index.add(keys)
    out = Outcome()
    try:
        there = GpuLists(index)
    except DistlmError as error:
        out.wrong.append(str(error))
        return out
    there.search(queries, K, NPROBE)
    began = time.perf_counter()
    found = there.search(queries, K, NPROBE)
    device_s = time.perf_counter() - began
    index.nprobe = NPROBE
    began = time.perf_counter()
    wanted = index.search(queries, K)
    processor_s = time.perf_counter() - began
    try:
        out.figures["neighbours shared"] = round(check_agreement(found, wanted), 4)
    except DistlmError as error:
        out.wrong.append(str(error))
    out.figures |= {"queries/s": round(QUERIES / device_s), "queries/s, processor": round(QUERIES / processor_s)}
    return out
