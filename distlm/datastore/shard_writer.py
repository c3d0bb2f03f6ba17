"""Rows of a shard to disk while the model computes: a thread writes and hashes, a bounded queue holds what waits."""

import os
import queue
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import xxhash
from msgspec import structs
from torch import Tensor

from distlm.datastore.manifest import VALUE_DTYPE, shard_files
from distlm.datastore.plan import Unit
from distlm.datastore.records import Shard
from distlm.datastore.settings import Settings
from distlm.datastore.unfinished.files import Done, part_path
from distlm.errors import DistlmError
from distlm.system_errors import told

QUEUE_BATCHES = 3
"""Batches waiting at most: memory is one batch more than this (the one being written)."""
_SYNC_BYTES = 64 << 20
"""The disk is made to keep up in steps of this size, so that the last fsync of a shard is short."""


@dataclass
class Streak:
    """A shard that one process has written from its first row on: its checksums need no reading back."""

    shard: int = -1
    rows: int = 0
    """Written so far, in order."""
    digests: tuple[Any, Any] = (None, None)
    """Of the file of keys and that of values up to there."""

    def before(self, unit: Unit) -> tuple[Any, Any]:
        """The digests that go on with `unit`; none where it does not follow."""
        if unit.first == 0:
            return xxhash.xxh3_128(), xxhash.xxh3_128()
        return self.digests if (self.shard, self.rows) == (unit.shard, unit.first) else (None, None)


class ShardWriter:
    """Streams units of a shard, which follow each other, into its two files (unfinished.part_path), at their places.

    with ShardWriter(folder, settings, shard, units, streak) as writer:
        writer.put(keys, targets)
    writer.done        # the checksums of each unit, whose bytes are on the disk
    writer.finished    # the shard with its checksums, when this process has written all of it; else None

    Without units: the whole shard, as one. Several processes may write a shard at once. `streak` is carried from one
    writer of a process to its next. Memory: QUEUE_BATCHES + 1 batches of keys in the type on disk, whatever the rows.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        shard: Shard,
        units: Sequence[Unit] = (),
        streak: Streak | None = None,
    ) -> None:
        self._settings, self._shard = settings, shard
        self._units = list(units) or [Unit(shard.index, 0, 0, shard.rows)]
        self._streak = Streak() if streak is None else streak
        self._files = shard_files(folder, settings, shard)
        self._dtype = {"float16": torch.float16, "float32": torch.float32}[settings.key_dtype]
        self._queue: queue.Queue[tuple[Tensor, Tensor, Tensor] | None] = queue.Queue(QUEUE_BATCHES)
        self._failure: BaseException | None = None
        self._abandoned = self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"shard-{shard.index}", daemon=True)
        self.done: Done = {}
        self.finished: Shard | None = None

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
            # A caller of `put` must not wait for a thread that has ended.
            while not self._ended:
                self._ended = self._queue.get() is None

    def _write(self) -> None:
        streak, begin = self._streak, self._units[0]
        whole = streak.before(begin)
        # No other unit may continue a streak that failed half-way.
        streak.shard = -1
        with told(self._files[0][0], *(part_path(path) for path, *_ in self._files)), ExitStack() as stack:
            keys, values = (
                stack.enter_context(_HashedFile(path, header, size, self._shard.rows, begin.first, digest))
                for (path, header, size, _), digest in zip(self._files, whole, strict=True)
            )
            row, ends = begin.first, [unit.first + unit.rows for unit in self._units]
            while (item := self._queue.get()) is not None:
                rows, extremes, targets = item
                array = rows.cpu().numpy()
                self._check(array, extremes.tolist(), row)
                tokens = targets.numpy().astype(VALUE_DTYPE)
                row += len(array)
                while len(self.done) < len(ends) and ends[len(self.done)] <= row:
                    # A batch may go beyond the end of a unit.
                    own = len(array) - (row - ends[len(self.done)])
                    keys.write(array[:own])
                    values.write(tokens[:own])
                    self.done[self._units[len(self.done)].key] = [keys.take(), values.take()]
                    array, tokens = array[own:], tokens[own:]
                keys.write(array)
                values.write(tokens)
            self._ended = True
            if self._abandoned:
                raise _AbandonedError
            if row != ends[-1]:
                raise ValueError(f"shard {self._shard.index}: rows up to {row} were put, planned was {ends[-1]}")
        # Here the data of both files is on the disk.
        if whole[0] is not None:
            streak.shard, streak.rows, streak.digests = begin.shard, row, whole
            if row == self._shard.rows:
                hashes = [digest.hexdigest() for digest in whole]
                self.finished = structs.replace(self._shard, keys_hash=hashes[0], values_hash=hashes[1], done=True)

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
    """The model failed: what is written of the units counts for nothing."""


class _HashedFile:
    """Writes rows from a place in a file on, and hashes them; makes the disk keep up."""

    def __init__(self, path: Path, header: bytes, size: int, rows: int, first: int, whole: Any) -> None:
        self._path, self._header, self._whole = part_path(path), header, whole
        self._first, self._offset = first, len(header) + first * ((size - len(header)) // rows)
        self._unsynced, self._unit = 0, xxhash.xxh3_128()

    def __enter__(self) -> "_HashedFile":
        # Not truncated: other processes write their own ranges of it.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._stream = os.fdopen(descriptor, "wb")
        if self._first == 0:
            self._stream.write(self._header)
            self._whole.update(self._header)
        self._stream.seek(self._offset)
        return self

    def write(self, rows: np.ndarray) -> None:
        if not rows.size:
            return
        data = rows.data.cast("B")
        self._unit.update(data)
        if self._whole is not None:
            self._whole.update(data)
        self._stream.write(data)
        self._unsynced += data.nbytes
        if self._unsynced >= _SYNC_BYTES:
            self._sync()

    def take(self) -> str:
        """xxh3-128 of what was written since the last call."""
        digest, self._unit = self._unit.hexdigest(), xxhash.xxh3_128()
        return digest

    def _sync(self) -> None:
        self._stream.flush()
        os.fdatasync(self._stream.fileno())
        self._unsynced = 0

    def __exit__(self, kind: type[BaseException] | None, _value: object, _tb: object) -> None:
        with self._stream:
            if kind is None:
                self._sync()
