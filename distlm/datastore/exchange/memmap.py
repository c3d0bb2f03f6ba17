"""Datastores as the original kNN-LM keeps them: PREFIX_keys.npy and PREFIX_vals.npy, raw memory maps without a header.

Keys are [N, D] float16 or float32, values [N, 1] int64, int32 or int16, in corpus order, N = tokens − context_window.
With --dstore-fp16 the original stores values as int16 although ids reach 267,743: such files are refused, and never
written. Rows are streamed, so memory is a few pieces of PIECE_BYTES; each rank imports the rows of its units, and
exports those of its shards.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distlm.datastore.plan import ShardPlan
from distlm.datastore.reader import Datastore
from distlm.datastore.records import Shard
from distlm.datastore.shard_writer import ShardWriter
from distlm.datastore.writer import Fill, StoreJob, StoreSummary, fill_store, open_job
from distlm.errors import DistlmError
from distlm.runtime.files import require_free_disk, sync_file, sync_folder
from distlm.runtime.progress import Progress
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.stage import Stage

PIECE_BYTES = 16 << 20
"""Keys read and written at once."""
KEY_DTYPES, VALUE_DTYPES = ("float16", "float32"), ("int64", "int32", "int16")


@dataclass(frozen=True)
class RawStore:
    """The two files of a prefix."""

    prefix: str

    @property
    def keys(self) -> Path:
        """[N, D]."""
        return Path(f"{self.prefix}_keys.npy")

    @property
    def values(self) -> Path:
        """[N, 1]."""
        return Path(f"{self.prefix}_vals.npy")

    def bytes_per_row(self, path: Path, rows: int) -> float:
        """Size of one of the files / rows. Raises DistlmError when it is missing."""
        if not path.is_file():
            raise DistlmError(f"{path}: no such file; --prefix is what comes before _keys.npy and _vals.npy")
        return path.stat().st_size / rows

    def value_dtype(self, rows: int, vocabulary: int) -> np.dtype[Any]:
        """Type of the values, by the size of their file. Raises DistlmError for another number of rows, and for int16
        under a vocabulary that does not fit."""
        per_row = self.bytes_per_row(self.values, rows)
        found = {float(np.dtype(name).itemsize): np.dtype(name) for name in VALUE_DTYPES}.get(per_row)
        if found is None:
            raise _other_rows(self.values, rows, "2, 4 or 8 bytes")
        if found == np.int16 and vocabulary > np.iinfo(np.int16).max + 1:
            raise DistlmError(
                f"{self.values}: int16 values, and the dictionary has {vocabulary} words: ids above 32767 have "
                "overflowed (--dstore-fp16 of the original does that); write the store anew with `distlm datastore "
                "write`"
            )
        return found

    def key_dtype(self, rows: int, width: int) -> np.dtype[Any]:
        """Type of the keys, by the size of their file. Raises DistlmError for another number of rows or width."""
        per_number = self.bytes_per_row(self.keys, rows) / width
        found = {float(np.dtype(name).itemsize): np.dtype(name) for name in KEY_DTYPES}.get(per_number)
        if found is None:
            raise _other_rows(self.keys, rows, f"{width} numbers of 2 or 4 bytes")
        return found


def import_memmap(stage: Stage, prefix: str) -> StoreSummary:
    """PREFIX_keys.npy and PREFIX_vals.npy become RUN/datastore; finished shards of an earlier start are kept.

    The rows must be those that `datastore write` would store: N = tokens − datastore.context_window of
    datastore.split, and every value the token at its place; keys are taken on trust as datastore.tap of the run's
    model. Returns what run_datastore_write does. Raises DistlmError on every rank for files of another size, keys of
    another type than datastore.key_dtype, overflowed or other values, and what run_datastore_write refuses.
    """
    raw = RawStore(prefix)
    job = together(stage.comm, lambda: open_job(stage.config, stage.run))
    value_dtype = together(stage.comm, lambda: _check_raw(raw, job))

    def fill() -> Fill:
        keys = np.memmap(raw.keys, job.settings.key_dtype, "r", shape=(job.plan.rows, job.settings.width))
        values = np.memmap(raw.values, value_dtype, "r", shape=(job.plan.rows,))
        return partial(_copy_rows, raw, keys, values, job)

    return fill_store(stage, job, fill)


def export_memmap(stage: Stage, prefix: str, key_dtype: str = "", value_dtype: str = "int64") -> dict[str, int | str]:
    """RUN/datastore as PREFIX_keys.npy and PREFIX_vals.npy, every rank its own rows; a killed start begins anew.

    `key_dtype`: float16 or float32; empty: the store's. The files appear, whole, when all rows are written; an error
    leaves none.
    Returns rows, width, bytes. Raises DistlmError on every rank for files that are there already, a damaged store,
    values or keys that do not fit their type, and a full disk; Stopped after a stop signal.
    """
    comm, raw = stage.comm, RawStore(prefix)
    store = together(comm, lambda: Datastore.open(stage.run.datastore))
    stage.require_whole(store.folder, store.written())
    types = np.dtype(key_dtype or store.key_dtype), np.dtype(value_dtype)
    size = store.rows * (store.width * types[0].itemsize + types[1].itemsize)
    rank0_first(comm, lambda: _begin_export(raw, store, types, size))
    try:
        _export_shards(stage, raw, store, types)
    except Exception:
        # All ranks have stopped; nothing else knows these files.
        if comm.rank == 0:
            _remove_temporaries(raw)
        raise
    rank0_first(comm, lambda: _finish_export(raw))
    return {"rows": store.rows, "width": store.width, "keys": types[0].name, "values": types[1].name, "bytes": size}


def _export_shards(stage: Stage, raw: RawStore, store: Datastore, types: tuple[np.dtype[Any], np.dtype[Any]]) -> None:
    comm, shards = stage.comm, store.shards
    with Progress("datastore export-memmap", store.rows, "rows", comm.rank) as progress:
        for turn in range(ceil(len(shards) / comm.size)):
            stage.stop.check(comm, "datastore export-memmap")
            now = shards[turn * comm.size : (turn + 1) * comm.size]

            def unit(now: list[Shard] = now) -> None:
                for shard in now[comm.rank : comm.rank + 1]:
                    _export_shard(raw, store, shard, types)

            together(comm, unit)
            progress.advance(sum(shard.rows for shard in now))


def _check_raw(raw: RawStore, job: StoreJob) -> np.dtype[Any]:
    """The type of the values, after everything that sizes tell."""
    rows, settings = job.plan.rows, job.settings
    found = raw.key_dtype(rows, settings.width)
    if found != np.dtype(settings.key_dtype):
        raise DistlmError(
            f"{raw.keys}: {found} keys, datastore.key_dtype={settings.key_dtype}; set datastore.key_dtype={found}"
        )
    # Hours before the ranks come to it.
    _check_keys(raw, np.memmap(raw.keys, found, "r", shape=(rows, settings.width))[-1:].astype(np.float32), rows - 1)
    return raw.value_dtype(rows, settings.vocabulary)


def _copy_rows(
    raw: RawStore,
    keys: np.memmap,
    values: np.memmap,
    job: StoreJob,
    writer: ShardWriter,
    shard: ShardPlan,
    first: int,
    rows: int,
    advance: Callable[[int], None],
) -> None:
    for start, end in _pieces(shard.first_row + first, rows, job.settings.width):
        of_piece = np.array(values[start:end], dtype=np.int64)
        offset = shard.token_start - shard.first_row
        _check_values(raw, of_piece, job.ids[start + offset : end + offset], start)
        of_keys = np.array(keys[start:end], np.float32)
        _check_keys(raw, of_keys, start)
        writer.put(torch.from_numpy(of_keys), torch.from_numpy(of_piece))
        advance(end - start)


def _check_keys(raw: RawStore, keys: npt.NDArray[np.float32], first: int) -> None:
    """Keys fp32 [n, D] of the rows from `first` on: finite, and written."""
    # NaN and infinity are handed on; a hidden state is never all zeros, what was not written of a memory map is.
    largest = np.abs(keys).max(axis=1)
    wrong = np.flatnonzero(~np.isfinite(largest) | (largest == 0))
    if len(wrong):
        row, found = first + int(wrong[0]), float(largest[wrong[0]])
        why = "is all zeros: it was never written, the store is unfinished" if found == 0 else f"holds {found}"
        raise DistlmError(f"{raw.keys}: the key of row {row} {why}; write the store anew with the program that made it")


def _check_values(raw: RawStore, values: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32], first: int) -> None:
    """Values [n] of the rows from `first` on against the tokens [n] of the split."""
    wrong = np.flatnonzero(values != tokens)
    if not len(wrong):
        return
    row, found, expected = first + int(wrong[0]), int(values[wrong[0]]), int(tokens[wrong[0]])
    if found < 0:
        why = "a negative id: int16 values have overflowed; write the store anew with `distlm datastore write`"
    elif not values[wrong[0] :].any():
        why = "only zeros from there on: a store that was never finished; write the store anew"
    else:
        why = (
            "values of another dictionary, text or context; prepare the text with the model's dict.txt "
            "(data.dictionary=), and set datastore.context_window to the one of the store"
        )
    raise DistlmError(f"{raw.values}: row {row} holds {found}, the token there is {expected}: {why}")


def _begin_export(raw: RawStore, store: Datastore, types: tuple[np.dtype[Any], np.dtype[Any]], size: int) -> None:
    most = int(np.iinfo(types[1]).max)
    if store.vocabulary - 1 > most:
        raise DistlmError(
            f"--values {types[1]}: ids reach {store.vocabulary - 1}, above its {most}; use --values int32 or int64"
        )
    for path in (raw.keys, raw.values):
        if path.exists():
            raise DistlmError(f"{path}: is there already; remove it or choose another --prefix")
    raw.keys.parent.mkdir(parents=True, exist_ok=True)
    # Before the disk is looked at: those of a killed start are begun anew.
    _remove_temporaries(raw)
    require_free_disk(raw.keys.parent, size, "raw datastore")
    for path, row_bytes in ((raw.keys, store.width * types[0].itemsize), (raw.values, types[1].itemsize)):
        with _temporary(path).open("wb") as stream:
            stream.truncate(store.rows * row_bytes)


def _export_shard(raw: RawStore, store: Datastore, shard: Shard, types: tuple[np.dtype[Any], np.dtype[Any]]) -> None:
    keys, values = store.keys(shard.index), store.values(shard.index)
    with _temporary(raw.keys).open("r+b") as key_file, _temporary(raw.values).open("r+b") as value_file:
        key_file.seek(shard.first_row * store.width * types[0].itemsize)
        value_file.seek(shard.first_row * types[1].itemsize)
        for first, last in _pieces(0, shard.rows, store.width):
            with np.errstate(over="ignore"):
                piece = np.ascontiguousarray(keys[first:last], dtype=types[0])
            if not np.isfinite(piece).all():
                raise DistlmError(f"{store.folder}: keys of shard {shard.index} do not fit float16; use --keys float32")
            key_file.write(piece.data.cast("B"))
            value_file.write(values[first:last].astype(types[1]).data.cast("B"))
        for stream in (key_file, value_file):
            stream.flush()
            os.fsync(stream.fileno())


def _finish_export(raw: RawStore) -> None:
    for path in (raw.keys, raw.values):
        sync_file(_temporary(path))
        _temporary(path).replace(path)
    sync_folder(raw.keys.parent)


def _temporary(path: Path) -> Path:
    """One name for all ranks, which write into it at once."""
    return path.with_name(f".{path.name}.tmp")


def _remove_temporaries(raw: RawStore) -> None:
    for path in (raw.keys, raw.values):
        _temporary(path).unlink(missing_ok=True)


def _pieces(first: int, rows: int, width: int) -> list[tuple[int, int]]:
    """Half-open ranges of PIECE_BYTES of fp32 keys that make up [first, first + rows)."""
    step = max(1, PIECE_BYTES // (4 * width))
    return [(start, min(start + step, first + rows)) for start in range(first, first + rows, step)]


def _other_rows(path: Path, rows: int, row: str) -> DistlmError:
    return DistlmError(
        f"{path}: {path.stat().st_size} bytes are not {rows} rows of {row}; rows are the tokens of datastore.split "
        "less datastore.context_window: set these to what the store was written with"
    )
