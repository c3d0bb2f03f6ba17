"""One shard to disk while the model computes: a thread writes and hashes, a bounded queue holds what waits."""

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch
import xxhash
from msgspec import structs
from torch import Tensor

from distlm.datastore.manifest import VALUE_DTYPE, shard_files
from distlm.datastore.records import Shard
from distlm.datastore.settings import Settings
from distlm.errors import DistlmError
from distlm.runtime.files import atomic_path

QUEUE_BATCHES = 3
"""Batches waiting at most: memory is one batch more than this (the one being written)."""
_SYNC_BYTES = 64 << 20
"""The disk is made to keep up in steps of this size, so that the last fsync of a shard is short."""


class ShardWriter:
    """Streams a shard's batches into its two .npy files; both appear, whole, when the `with` block ends well.

    with ShardWriter(folder, settings, shard) as writer:
        writer.put(keys, targets)
    writer.finished    # the shard with its checksums

    Memory: QUEUE_BATCHES + 1 batches of keys in the type on disk, whatever the rows of the shard.
    """

    def __init__(self, folder: Path, settings: Settings, shard: Shard) -> None:
        self._settings, self._shard = settings, shard
        self._files = shard_files(folder, settings, shard)
        self._dtype = {"float16": torch.float16, "float32": torch.float32}[settings.key_dtype]
        self._queue: queue.Queue[tuple[Tensor, Tensor, Tensor] | None] = queue.Queue(QUEUE_BATCHES)
        self._failure: BaseException | None = None
        self._abandoned = self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"shard-{shard.index}", daemon=True)
        self.finished = shard

    def __enter__(self) -> "ShardWriter":
        self._thread.start()
        return self

    def put(self, keys: Tensor, targets: Tensor) -> None:
        """The next rows: keys fp32 [n, D] on any device, targets int64 [n]. Waits while the queue is full.

        Raises what went wrong with an earlier batch: DistlmError for keys that are not finite or do not fit the
        type on disk, and for a full disk.
        """
        self._raise()
        # aminmax hands on a NaN; nothing is read from the device here, so a GPU is not waited for.
        extremes = torch.stack(torch.aminmax(keys)) if keys.numel() else keys.new_zeros(2)
        self._queue.put((keys.to(self._dtype), extremes, targets))

    def __exit__(
        self, kind: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._abandoned = kind is not None
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self._failure = error
            # Whoever puts must not wait for a thread that is gone.
            while not self._ended:
                self._ended = self._queue.get() is None

    def _write(self) -> None:
        (keys_path, keys_header, _, _), (values_path, values_header, _, _) = self._files
        with ExitStack() as stack:
            keys_file = stack.enter_context(_hashed(keys_path, keys_header))
            values_file = stack.enter_context(_hashed(values_path, values_header))
            rows = 0
            while (item := self._queue.get()) is not None:
                keys, extremes, targets = item
                array = keys.cpu().numpy()
                self._check(array, extremes.tolist(), rows)
                keys_file.write(array.data.cast("B"))
                values_file.write(targets.numpy().astype(VALUE_DTYPE).data.cast("B"))
                rows += len(array)
            self._ended = True
            if self._abandoned:
                raise _AbandonedError
            if rows != self._shard.rows:
                raise ValueError(f"shard {self._shard.index}: {rows} rows were put, planned were {self._shard.rows}")
        # Here both files are in their places, fsynced and renamed.
        self.finished = structs.replace(
            self._shard, keys_hash=keys_file.digest.hexdigest(), values_hash=values_file.digest.hexdigest()
        )

    def _check(self, array: np.ndarray, extremes: list[float], first: int) -> None:
        # One comparison of two numbers per batch instead of a look at every key; a NaN fails it.
        limit = float(np.finfo(array.dtype).max)
        low, high = extremes
        if -limit <= low and high <= limit:
            return
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if len(bad) == 0:  # above the limit, and rounded down to it
            return
        row, shard = first + int(bad[0]), self._shard
        where = f"{self._files[0][0]}: shard {shard.index} row {row} (token {shard.token_start + row} of the split)"
        worst = max(abs(low), abs(high))
        if np.isfinite(worst):
            raise DistlmError(
                f"{where}: a key component of {worst:.6g} does not fit {array.dtype} (largest {limit:.6g}); "
                "set datastore.key_dtype=float32 in another run_dir=, or choose another datastore.tap"
            )
        raise DistlmError(
            f"{where}: the model gives {'NaN' if worst != worst else 'an infinite value'} there; "
            "datastore.key_dtype=float32 will not help: use another datastore.checkpoint"
        )


class _AbandonedError(Exception):
    """The model failed: what is written of the shard must not stay."""


class _HashedFile:
    """Writes and hashes; makes the disk keep up."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._unsynced = stream, 0
        self.digest = xxhash.xxh3_128()

    def write(self, data: memoryview) -> None:
        self.digest.update(data)
        self._stream.write(data)
        self._unsynced += data.nbytes
        if self._unsynced >= _SYNC_BYTES:
            self._stream.flush()
            os.fdatasync(self._stream.fileno())
            self._unsynced = 0


@contextmanager
def _hashed(path: Path, header: bytes) -> Iterator[_HashedFile]:
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        file = _HashedFile(stream)
        file.write(memoryview(header))
        yield file
