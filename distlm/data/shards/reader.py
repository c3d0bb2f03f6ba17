"""Reading shards: rows by number, rows of an update in training order, and a thread that reads ahead."""

import io
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import UnsetType

from distlm.data.shards.files import MANIFEST, TOKENIZER_FOLDER, Chunk, Shard, ShardsManifest
from distlm.data.shards.order import Pool, Rows, ShardOrder, update_positions
from distlm.data.shards.records import ManifestFile
from distlm.data.shards.wordpiece import WordPiece
from distlm.errors import DistlmError
from distlm.runtime.checked import Written
from distlm.runtime.files import bytes_hash, file_hash, json_hash
from distlm.system_errors import system_error

T = TypeVar("T")
Ids = npt.NDArray[np.int32]
QUEUE = 4
"""Updates read ahead at most."""
_REMEMBERED_CHUNKS = 8


@dataclass(frozen=True)
class RowBatch:
    """Rows of an update, or a part of it."""

    update: int
    tokens: Ids
    """[n, S]"""
    rows: Rows
    """Row numbers in the split [n]; with epochs and the seed they key the masks."""
    epochs: Rows
    """[n]; two values where an update lies across the end of an epoch."""


class ShardRows:
    """The rows of one split: N rows of S tokens, numbered 0 … N − 1 in the order of the text."""

    def __init__(self, folder: Path, split: str, manifest: ShardsManifest) -> None:
        """Use `open`."""
        self.folder, self.split, self.tokenizer = folder, split, manifest.tokenizer
        self.row_tokens = manifest.row_tokens
        """S, [CLS] and [SEP] included."""
        self._dtype = manifest.dtype
        self._shards = manifest.shards[split]
        self._chunks: list[tuple[Shard, Chunk]] = [(shard, chunk) for shard in self._shards for chunk in shard.chunks]
        self.chunk_rows = np.array([chunk.rows for _, chunk in self._chunks], np.int64)
        self._first_rows = np.concatenate([[0], np.cumsum(self.chunk_rows)])
        self.text_tokens = sum(shard.tokens for shard in self._shards)
        """Tokens of text, without [CLS], [SEP] and padding."""
        self._special = np.zeros(self.tokenizer.vocabulary, bool)
        self._special[list(self.tokenizer.special_ids)] = True
        self._remembered: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()
        self._readers: dict[tuple[int, int], UpdateReader] = {}

    @classmethod
    def open(cls, folder: Path, split: str) -> "ShardRows":
        """Open a split of a finished folder. The contents of a shard are checked when it is read.

        Raises DistlmError when there are no finished shards or no such split, when a shard is missing or has another
        size than the manifest says, or when the vocabulary beside the shards is not theirs.
        """
        folder = Path(folder)
        manifest = ShardsManifest.read(folder)
        if split not in manifest.shards:
            raise DistlmError(
                f"{folder}: no {split} split; it has {', '.join(manifest.shards)} (shards.splits decides when the "
                "shards are made)"
            )
        for shard in manifest.shards[split]:
            if problem := shard.problem(folder):
                raise DistlmError(
                    f"{shard.path(folder)}: {problem}; copy the file again, or run `distlm data shard` again: it makes "
                    "the shard anew"
                )
        tokenizer = WordPiece.load(folder / TOKENIZER_FOLDER, manifest.tokenizer.lower_case)
        if tokenizer.hash != manifest.tokenizer.hash:
            raise DistlmError(
                f"{folder / TOKENIZER_FOLDER}: not the vocabulary these shards were made with (hash {tokenizer.hash}, "
                f"{MANIFEST} says {manifest.tokenizer.hash}); put the right vocab.txt back, or make the shards again"
            )
        return cls(folder, split, manifest)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    @property
    def vocabulary(self) -> int:
        """V: ids are below it."""
        return self.tokenizer.vocabulary

    @property
    def fingerprint(self) -> str:
        """Identifies tokenizer, row length, and the contents and order of all rows."""
        chunks = [[chunk.rows, chunk.hash] for _, chunk in self._chunks]
        return json_hash({"tokenizer": self.tokenizer.hash, "row_tokens": self.row_tokens, "chunks": chunks})

    def require_tokenizer(self, tokenizer_hash: str, vocabulary: int, whose: str) -> None:
        """DistlmError when `whose` (a model, a checkpoint) has another vocabulary than these shards."""
        if vocabulary != self.vocabulary:
            raise DistlmError(
                f"{self.folder}: vocabulary mismatch: the shards' ids are below {self.vocabulary}, {whose} has "
                f"{vocabulary} pieces; make shards with its vocabulary (shards.vocabulary=, another shards.folder=)"
            )
        if tokenizer_hash != self.tokenizer.hash:
            raise DistlmError(
                f"{self.folder}: shards of another tokenizer ({self.tokenizer.hash}; {whose} has {tokenizer_hash}); "
                "make shards with its vocabulary (shards.vocabulary=, shards.lower_case=, another shards.folder=)"
            )

    def is_text(self, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """True where there is no padding; shape of `tokens`."""
        return tokens != self.tokenizer.pad

    def is_counted(self, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """True where there is neither padding nor a special token; shape of `tokens`."""
        return ~self._special[tokens]

    def rows(self, numbers: npt.ArrayLike) -> Ids:
        """Rows by number [n] → int32 [n, S]. Quick for rows that are near each other.

        Raises DistlmError for a chunk whose bytes are not those that were written.
        """
        wanted = np.asarray(numbers, np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)}")
        tokens = np.empty((len(wanted), self.row_tokens), np.int32)
        chunks = np.searchsorted(self._first_rows, wanted, "right") - 1
        for number in np.unique(chunks).tolist():
            inside = chunks == number
            if number not in self._remembered:
                self._remembered[number] = self.read_chunks([number])
                if len(self._remembered) > _REMEMBERED_CHUNKS:
                    self._remembered.popitem(last=False)
            tokens[inside] = self._remembered[number][wanted[inside] - self._first_rows[number]]
        return tokens

    def rows_for_update(self, seed: int, update: int, rows_per_update: int, places: Rows | None = None) -> RowBatch:
        """Rows of update number `update` (0-based), or those at `places` of its `rows_per_update`.

        The updates read one stream over shuffled epochs (distlm.data.shards.order): which rows an update has depends on
        (seed, update, rows_per_update) alone. For many updates one after another use RowStream.
        """
        key = (seed, rows_per_update)
        if key not in self._readers:
            self._readers = {key: UpdateReader(self, seed, rows_per_update)}
        return self._readers[key].read(update, places)

    def read_chunks(self, numbers: list[int]) -> npt.NDArray[Any]:
        """Rows of some chunks laid end to end, [rows, S] in the type on disk. Reads forwards where numbers rise."""
        parts = []
        stream, name = None, ""
        try:
            for number in numbers:
                shard, chunk = self._chunks[number]
                if shard.name != name:
                    if stream is not None:
                        stream.close()
                    stream, name = shard.path(self.folder).open("rb", buffering=0), shard.name
                assert stream is not None
                parts.append(self._rows_of(shard, chunk, os.pread(stream.fileno(), chunk.bytes, chunk.offset)))
        except OSError as error:
            raise system_error(error, shard.path(self.folder)) from error
        finally:
            if stream is not None:
                stream.close()
        return np.concatenate(parts)

    def _rows_of(self, shard: Shard, chunk: Chunk, data: bytes) -> npt.NDArray[Any]:
        if bytes_hash(data) != chunk.hash:
            raise DistlmError(
                f"{shard.path(self.folder)}: the bytes from {chunk.offset} on are not those that were written "
                f"(checksum of {chunk.bytes} bytes): damaged, or of other shards; copy the file again, or delete it "
                "and run `distlm data shard` again"
            )
        rows: npt.NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
        if rows.shape != (chunk.rows, self.row_tokens) or rows.dtype != self._dtype:
            raise DistlmError(
                f"{shard.path(self.folder)}: chunk of {rows.shape} {rows.dtype} where {MANIFEST} says "
                f"{(chunk.rows, self.row_tokens)} {self._dtype}; make the shards again"
            )
        return rows


class UpdateReader:
    """Rows of updates in training order; keeps the two pools that it read last."""

    def __init__(self, rows: ShardRows, seed: int, rows_per_update: int) -> None:
        self._rows, self._rows_per_update = rows, rows_per_update
        self._order = ShardOrder(rows.chunk_rows, seed)
        self._pools: OrderedDict[tuple[int, int], tuple[Pool, npt.NDArray[Any]]] = OrderedDict()

    def read(self, update: int, places: Rows | None = None) -> RowBatch:
        """As ShardRows.rows_for_update."""
        positions = update_positions(update, self._rows_per_update)
        positions = positions if places is None else positions[places]
        count = len(positions)
        tokens = np.empty((count, self._rows.row_tokens), np.int32)
        rows, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
        for epoch, number, inside, entries in self._order.locate(positions):
            pool, held = self._pool(epoch, number)
            tokens[inside] = held[pool.places[entries]]
            rows[inside], epochs[inside] = pool.rows[entries], epoch
        return RowBatch(update, tokens, rows, epochs)

    def _pool(self, epoch: int, number: int) -> tuple[Pool, npt.NDArray[Any]]:
        key = (epoch, number)
        if key not in self._pools:
            while len(self._pools) > 1:
                self._pools.popitem(last=False)
            pool = self._order.pool(epoch, number)
            self._pools[key] = pool, self._rows.read_chunks(pool.chunks.tolist())
        return self._pools[key]


class RowStream(Generic[T]):
    """Updates one after another from any update on, read (and prepared) by a thread, at most QUEUE ahead.

    with RowStream(rows, seed, update, rows_per_update, places, prepare) as stream:
        batch = next(stream)
        stream.waited_s      # what the caller waited for this one

    `places` as in ShardRows.rows_for_update (see order.rank_places); `prepare` is called in the thread with each
    RowBatch and gives what `next` returns, e.g. masked tensors. What goes wrong in the thread is raised by `next`.
    """

    def __init__(
        self, rows: ShardRows, seed: int, update: int, rows_per_update: int, places: Rows | None,
        prepare: Callable[[RowBatch], T],
    ) -> None:  # fmt: skip
        self._reader = UpdateReader(rows, seed, rows_per_update)
        self._update, self._places, self._prepare = update, places, prepare
        self._queue: queue.Queue[T | BaseException] = queue.Queue(QUEUE)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="row-stream", daemon=True)
        self.waited_s = 0.0
        """Seconds that the last `next` waited."""
        self.total_waited_s = 0.0
        """Seconds that all of them waited."""

    def __enter__(self) -> "RowStream[T]":
        self._thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> "RowStream[T]":
        return self

    def __next__(self) -> T:
        if self._failure is not None:
            raise self._failure
        start = time.perf_counter()
        item = self._queue.get()
        self.waited_s = time.perf_counter() - start
        self.total_waited_s += self.waited_s
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def close(self) -> None:
        """End the thread. Call from the thread that reads."""
        self._closed.set()
        while self._thread.is_alive():
            # It may wait for room in the queue.
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(0.02)

    def _run(self) -> None:
        update = self._update
        try:
            while not self._closed.is_set():
                self._put(self._prepare(self._reader.read(update, self._places)))
                update += 1
        except BaseException as error:
            self._put(error)

    def _put(self, item: T | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def written_shards(folder: Path) -> list[Written]:
    """The shards of every split, and the tokenizer, as they were written. Raises DistlmError when there are no finished
    shards."""
    mend = "copy it again, or delete it and run `distlm data shard` again"
    shards = (shard for of_split in ShardsManifest.read(folder).shards.values() for shard in of_split)
    others = ManifestFile.read(folder / MANIFEST).others
    names = {} if isinstance(others, UnsetType) else others
    return [
        *(Written(shard.path(folder), shard.hash, mend) for shard in shards),
        *(
            Written(folder / name, digest, "remove the folder and make the shards again")
            for name, digest in names.items()
        ),
    ]


def verify_shards(folder: Path) -> list[str]:
    """Read every shard of every split and compare it with the manifest: the problems, one line each.

    Raises DistlmError when there are no finished shards.
    """
    manifest = ShardsManifest.read(folder)
    problems = []
    for shard in (shard for shards in manifest.shards.values() for shard in shards):
        path, problem = shard.path(folder), shard.problem(folder)
        if problem is None and file_hash(path) != shard.hash:
            problem = f"its bytes are not those that were written (xxh3-128, {MANIFEST} says {shard.hash})"
        if problem:
            problems.append(f"{path}: {problem}; copy it again, or delete it and run `distlm data shard` again")
    return problems
