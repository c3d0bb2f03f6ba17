"""Rates of this machine for one factory, measured by the code that will do the work, in about a minute."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from distlm.index.build.encode import Encoder, transforms_of
from distlm.index.build.torch_lists import gpu_device
from distlm.index.factory import Factory, inverted_file
from distlm.index.faiss_module import rank_threads, require_faiss
from distlm.index.layout import Array, Header, deserialise, lists_header, serialise
from distlm.index.merge.copy import MergeLayout
from distlm.index.merge.write import UNIT_BYTES, write_merged
from distlm.index.records import Rates
from distlm.index.train.codes import codebooks, needed_rows
from distlm.index.train.kmeans import kmeans
from distlm.index.train.sample import Held
from distlm.index.train.team import Team
from distlm.index.train.transforms import train_transforms
from distlm.runtime.files import require_free_disk, sync_file
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.stop import StopFlag

QUICK_KEYS = 64
"""Training keys per list of the stand-in template: it must have the right shape, not the right centroids."""
DIRECTIONS = 48
MANY = 10**9
"""Keys of a store that is worth a plan: they decide how lists are found."""
READ_PIECE = 16 << 20


@dataclass(frozen=True)
class Amounts:
    """How much of each work is measured."""

    kmeans_keys: int = 32768
    transform_keys: tuple[int, int] = (4096, 16384)
    """Transforms are trained on so many keys, then on so many: what each key adds is the difference."""
    add_s: float = 5.0
    """Seconds of adding."""
    disk_bytes: int = 512 << 20
    """Bytes of the files that are written, read and merged."""


AMOUNTS = Amounts()


def calibrate(
    factory: Factory, folder: Path, tick: Callable[[str], None] = lambda what: None, amounts: Amounts = AMOUNTS
) -> Rates:
    """Measure the rates for `factory` with files in `folder` (1.5 GB by default, removed at the end).

    `tick` is told what is being measured. Raises DistlmError when the disk is too small.
    """
    require_free_disk(folder, 3 * amounts.disk_bytes, "measuring the disk")
    random = np.random.Generator(np.random.Philox(key=[2, 0]))
    tick("transforms")
    keys_s, fixed = _transforms(factory, random, amounts.transform_keys)
    tick("k-means")
    kmeans, codebooks = _kmeans(factory, random, amounts.kmeans_keys), _codebooks(factory, random)
    tick("adding")
    template = _stand_in(factory, random)
    add = _adding(template, factory.width, random, amounts.add_s)
    tick("disk")
    with TemporaryDirectory(dir=folder, prefix=".calibrate-") as place:
        write, read = _disk(Path(place), amounts.disk_bytes)
        tick("merging")
        merge = _merging(template, Path(place), random, amounts.disk_bytes)
    return Rates(rank_threads(), add, kmeans, codebooks, keys_s, fixed, write, read, merge)


def _seconds(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def _vectors(random: np.random.Generator, rows: int, width: int) -> Array:
    """fp32 [rows, width], most of whose variance lies in a few directions, as that of hidden states: how many centroids
    may be a key's nearest (build/integer_lists.py) goes by that."""
    directions = np.random.Generator(np.random.Philox(key=[2, 1])).standard_normal((DIRECTIONS, width), np.float32)
    vectors: Array = random.standard_normal((rows, DIRECTIONS), np.float32) @ directions
    vectors /= DIRECTIONS**0.5
    vectors += 0.3 * random.standard_normal((rows, width), np.float32)
    return vectors


def _team() -> Team:
    """One rank, as `index train` has it."""
    return Team(threads=rank_threads(), device=gpu_device())


def _held(keys: Array) -> Held:
    return Held(keys, 0, len(keys))


def _kmeans(factory: Factory, random: np.random.Generator, count: int) -> float:
    width = inverted_file(factory.build()).d
    keys = _held(_vectors(random, max(count, factory.nlist), width).astype(np.float16))

    def train(iterations: int) -> float:
        return _seconds(lambda: kmeans(keys, factory.nlist, iterations, 1, _team(), planned=MANY))

    # The difference leaves out what is done once: the first centroids. The better of two turns, because what else runs
    # on the machine only adds.
    return 5 * keys.total / max(1e-9, min(train(6) - train(1) for _ in range(2)))


def _codebooks(factory: Factory, random: np.random.Generator) -> float:
    inner = inverted_file(factory.build())
    if not isinstance(inner, require_faiss().IndexIVFPQ):
        return 0.0
    # One subspace for every thread.
    count = min(int(inner.pq.M), rank_threads())
    some = require_faiss().ProductQuantizer(count * int(inner.pq.dsub), count, int(inner.pq.nbits))
    some.cp.min_points_per_centroid = 1
    keys = _vectors(random, min(factory.sample, needed_rows(inner)), count * int(inner.pq.dsub))
    return inner.pq.M / count * _seconds(lambda: codebooks(some, keys, _team(), factory.used))


def _transforms(factory: Factory, random: np.random.Generator, counts: tuple[int, int]) -> tuple[float | None, float]:
    """(keys per second, fixed seconds) of training all vector transforms; None and 0 where there are none."""
    if not transforms_of(factory.build()):
        return None, 0.0
    few, many = (_held(_vectors(random, rows, factory.width)) for rows in counts)

    def train(held: Held) -> float:
        return _seconds(lambda: train_transforms(factory.build(), held, 1, _team(), factory.used))

    least, most = train(few), train(many)
    per_key = max(1e-12, (most - least) / (many.total - few.total))
    return 1 / per_key, max(0.0, least - per_key * few.total)


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


def _adding(template: bytes, width: int, random: np.random.Generator, seconds: float) -> float:
    index = deserialise(template)
    with Encoder(index, device=gpu_device(), keys=MANY) as encoder:
        keys = _vectors(random, encoder.batch, width).astype(np.float16)
        done, start = 0, time.perf_counter()
        while done < 2 * len(keys) or time.perf_counter() - start < seconds:
            encoder.add(keys.astype(np.float32), np.arange(done, done + len(keys), dtype=np.int64))
            done += len(keys)
            if done == len(keys):
                # The first batch touches its memory for the first time.
                warm = time.perf_counter()
        return (done - len(keys)) / (time.perf_counter() - warm)


def _disk(folder: Path, size: int) -> tuple[float, float]:
    """Bytes per second written (with fsync) and read."""
    path, piece = folder / "disk", os.urandom(min(READ_PIECE, size))

    def write() -> None:
        with path.open("wb") as stream:
            for _ in range(size // len(piece)):
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
    return size / writing, size / reading


def _merging(template: bytes, folder: Path, random: np.random.Generator, size: int) -> float:
    """Bytes per second of merging two parts of random codes."""
    header = Header(template)
    rows = size // 2 // (header.code_size + 8)
    sizes = np.stack([random.multinomial(rows, np.full(header.nlist, 1 / header.nlist)) for _ in range(2)])
    paths, starts = [], []
    for number in range(2):
        start = header.bytes(rows) + lists_header(sizes[number], header.code_size)
        path = folder / f"part-{number}"
        with path.open("wb") as stream:
            stream.write(start)
            left, piece = rows * (header.code_size + 8), os.urandom(min(READ_PIECE, size))
            for first in range(0, left, len(piece)):
                stream.write(piece[: min(len(piece), left - first)])
        sync_file(path)
        paths.append(path)
        starts.append(len(start))
    layout = MergeLayout(header.bytes(2 * rows), tuple(starts), tuple(paths), sizes, header.code_size)
    seconds = _seconds(lambda: write_merged(SingleComm(), StopFlag(), layout, folder / "merged", UNIT_BYTES))
    return layout.bytes / seconds
