"""Rates of this machine for one factory, measured by the code that will do the work, in about a minute."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from distlm.index.build.encode import Encoder, transforms_of
from distlm.index.build.torch_lists import gpu_device
from distlm.index.choose.plan import PQ_ITERATIONS, PQ_SAMPLE
from distlm.index.factory import Factory, inverted_file
from distlm.index.faiss_module import rank_threads, require_faiss
from distlm.index.layout import Array, Header, deserialise, lists_header, serialise
from distlm.index.merge.copy import MergeLayout
from distlm.index.merge.write import UNIT_BYTES, write_merged
from distlm.index.records import Rates
from distlm.runtime.files import require_free_disk, sync_file
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.cores import usable_cores
from distlm.runtime.stop import StopFlag

QUICK_KEYS = 64
"""Training keys per list of the stand-in template: it must have the right shape, not the right centroids."""
KMEANS_KEYS = 32768
TRANSFORM_KEYS = 4096, 16384
"""Transforms are trained on so many keys, then on so many: what each key adds is the difference."""
ADD_S = 5.0
"""Seconds of adding that are measured."""
DISK_BYTES = 512 << 20
READ_PIECE = 16 << 20


def calibrate(factory: Factory, folder: Path, tick: Callable[[str], None] = lambda what: None) -> Rates:
    """Measure the rates for `factory` with files in `folder` (1.5 GB, removed at the end).

    `tick` is told what is being measured. Raises DistlmError when the disk is too small.
    """
    require_free_disk(folder, 3 * DISK_BYTES, "measuring the disk")
    random = np.random.Generator(np.random.Philox(key=[2, 0]))
    tick("transforms")
    keys_s, fixed = _transforms(factory, random)
    tick("k-means")
    kmeans, codebooks = _kmeans(factory, random), _codebooks(factory, random)
    tick("adding")
    template = _stand_in(factory, random)
    add = _adding(template, factory.width, random)
    tick("disk")
    with TemporaryDirectory(dir=folder, prefix=".calibrate-") as place:
        write, read = _disk(Path(place))
        tick("merging")
        merge = _merging(template, Path(place), random)
    return Rates(rank_threads(), usable_cores(), add, kmeans, codebooks, keys_s, fixed, write, read, merge)


def _seconds(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def _vectors(random: np.random.Generator, rows: int, width: int) -> Array:
    return random.standard_normal((rows, width), np.float32)


def _all_cores(act: Callable[[], float]) -> float:
    """Train as `index train` does, on the node's cores."""
    faiss = require_faiss()
    faiss.omp_set_num_threads(usable_cores())
    try:
        return act()
    finally:
        faiss.omp_set_num_threads(rank_threads())


def _kmeans(factory: Factory, random: np.random.Generator) -> float:
    faiss = require_faiss()
    width = inverted_file(factory.build()).d
    keys = _vectors(random, max(KMEANS_KEYS, factory.nlist), width)

    def train(iterations: int) -> float:
        means = faiss.Kmeans(width, factory.nlist, niter=iterations, min_points_per_centroid=1)
        return _seconds(lambda: means.train(keys))

    # The difference leaves out what is done once: sampling, checking, the first centroids. The better of two turns,
    # because what else runs on the machine only adds.
    return _all_cores(lambda: 5 * len(keys) / max(1e-9, min(train(6) - train(1) for _ in range(2))))


def _codebooks(factory: Factory, random: np.random.Generator) -> float:
    faiss = require_faiss()
    inner = inverted_file(factory.build())
    if not isinstance(inner, faiss.IndexIVFPQ):
        return 0.0
    keys = _vectors(random, min(factory.sample, PQ_SAMPLE), inner.pq.dsub)
    means = faiss.Kmeans(inner.pq.dsub, inner.pq.ksub, niter=PQ_ITERATIONS, min_points_per_centroid=1)
    return float(inner.pq.M) * _all_cores(lambda: _seconds(lambda: means.train(keys)))


def _transforms(factory: Factory, random: np.random.Generator) -> tuple[float, float]:
    """(keys per second, fixed seconds) of training all vector transforms."""
    if not transforms_of(factory.build()):
        return float("inf"), 0.0
    few, many = (_vectors(random, rows, factory.width) for rows in TRANSFORM_KEYS)

    def train(keys: Array) -> float:
        # The index keeps its transforms alive.
        index = factory.build()
        chain = [part for part in transforms_of(index) if not part.is_trained]
        return _all_cores(lambda: _seconds(lambda: [part.train(keys) for part in chain]))

    least, most = train(few), train(many)
    per_key = max(1e-12, (most - least) / (len(many) - len(few)))
    return 1 / per_key, max(0.0, least - per_key * len(few))


def _stand_in(factory: Factory, random: np.random.Generator) -> bytes:
    """A template of this factory that was hardly trained: it costs as much to add to."""
    faiss = require_faiss()
    index = factory.build()
    inner = inverted_file(index)
    inner.cp.niter, inner.cp.min_points_per_centroid = 1, 1
    inner.cp.max_points_per_centroid = QUICK_KEYS
    if isinstance(inner, faiss.IndexIVFPQ):
        inner.pq.cp.niter, inner.pq.cp.min_points_per_centroid = 1, 1
        inner.do_polysemous_training = False
    for transform in transforms_of(index):
        if isinstance(transform, faiss.OPQMatrix):
            transform.niter, transform.niter_pq = 1, 1
    rows = max(factory.nlist, 2 * factory.width, 4096)
    index.train(_vectors(random, min(rows, factory.sample), factory.width))
    return serialise(index)


def _adding(template: bytes, width: int, random: np.random.Generator) -> float:
    index = deserialise(template)
    with Encoder(index, device=gpu_device()) as encoder:
        keys = _vectors(random, encoder.batch, width).astype(np.float16)
        done, start = 0, time.perf_counter()
        while done < 2 * len(keys) or time.perf_counter() - start < ADD_S:
            encoder.add(keys.astype(np.float32), np.arange(done, done + len(keys), dtype=np.int64))
            done += len(keys)
            if done == len(keys):
                # The first batch touches its memory for the first time.
                warm = time.perf_counter()
        return (done - len(keys)) / (time.perf_counter() - warm)


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes per second written (with fsync) and read."""
    path, piece = folder / "disk", os.urandom(READ_PIECE)

    def write() -> None:
        with path.open("wb") as stream:
            for _ in range(DISK_BYTES // len(piece)):
                stream.write(piece)
        sync_file(path)

    writing = _seconds(write)
    with path.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def read() -> None:
            while stream.read(READ_PIECE):
                pass

        reading = _seconds(read)
    path.unlink()
    return DISK_BYTES / writing, DISK_BYTES / reading


def _merging(template: bytes, folder: Path, random: np.random.Generator) -> float:
    """Bytes per second of merging two parts of random codes."""
    header = Header(template)
    rows = DISK_BYTES // 2 // (header.code_size + 8)
    sizes = np.stack([random.multinomial(rows, np.full(header.nlist, 1 / header.nlist)) for _ in range(2)])
    paths, starts = [], []
    for number in range(2):
        start = header.bytes(rows) + lists_header(sizes[number], header.code_size)
        path = folder / f"part-{number}"
        with path.open("wb") as stream:
            stream.write(start)
            left, piece = rows * (header.code_size + 8), os.urandom(READ_PIECE)
            for first in range(0, left, len(piece)):
                stream.write(piece[: min(len(piece), left - first)])
        sync_file(path)
        paths.append(path)
        starts.append(len(start))
    layout = MergeLayout(header.bytes(2 * rows), tuple(starts), tuple(paths), sizes, header.code_size)
    merged = folder / "merged"

    def merge() -> None:
        for path in paths:
            with path.open("rb") as stream:
                while stream.read(READ_PIECE):
                    pass
        write_merged(SingleComm(), StopFlag(), layout, merged, UNIT_BYTES)

    seconds = _seconds(merge)
    return layout.bytes / seconds
