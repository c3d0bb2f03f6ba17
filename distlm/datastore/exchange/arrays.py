"""A datastore from arrays: keys and values of any model or program in the format that everything here reads."""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from distlm.datastore.manifest import MANIFEST, planned_shard, read_manifest, store_bytes
from distlm.datastore.plan import ShardPlan
from distlm.datastore.reader import Datastore
from distlm.datastore.records import Manifest, Shard
from distlm.datastore.settings import Settings
from distlm.datastore.unfinished.files import clear, put_in_place
from distlm.errors import DistlmError, UsageError
from distlm.runtime.files import require_free_disk
from distlm.runtime.lock import only_writer
from distlm.runtime.ranks.comm import SingleComm

_PIECE_BYTES = 16 << 20
"""Keys, as fp32, taken at once: memory-mapped arrays are not read as a whole."""


def write_datastore(
    folder: str | os.PathLike[str],
    keys: npt.NDArray[np.floating[Any]],
    values: npt.NDArray[np.integer[Any]],
    *,
    vocabulary: int | None = None,
    key_dtype: Literal["float16", "float32"] | None = None,
    rows_per_shard: int = 1_000_000,
) -> Datastore:
    """Write `keys` [N, D] (any float dtype) and `values` [N] (any int dtype, token ids) as a datastore, and open it.

    Memory-mapped arrays are streamed. `vocabulary`: V, values are below it (None: the largest value + 1). `key_dtype`
    on disk: None: float16 for float16 keys, else float32. The store is of no model and no text, so `distlm knn search`
    of a run refuses it; `distlm index build` takes it (datastore.folder=FOLDER). Its manifest says `complete` last: a
    folder that a killed start has left is begun anew, and an error leaves nothing in it.

    Raises UsageError for other shapes or dtypes, an empty store, values outside 0..V−1; DistlmError for keys that are
    not finite or do not fit key_dtype, a folder that holds something, and a full disk.
    """
    folder, keys, values = Path(folder), np.asanyarray(keys), np.asanyarray(values)
    settings = _settings(keys, values, vocabulary, key_dtype, rows_per_shard)
    if folder.exists() and not folder.is_dir():
        raise DistlmError(f"{folder}: is a file; give another folder")
    with only_writer(folder, SingleComm(), "writing this datastore"):
        _refuse_foreign(folder, settings)
        shards = [_planned(settings, len(keys), first) for first in range(0, len(keys), rows_per_shard)]
        # Before the disk is looked at: what a killed start has left needs no room beside the new files.
        _remove(folder)
        require_free_disk(folder, store_bytes(settings, shards), "the datastore")
        Manifest.of_store(settings, len(keys), shards, complete=False).write(folder / MANIFEST)
        try:
            written = [_write(folder, settings, shard, keys, values) for shard in shards]
        except Exception:
            # The next start may have other settings, and wants the room.
            _remove(folder)
            (folder / MANIFEST).unlink(missing_ok=True)
            raise
        finally:
            clear(folder)
        Manifest.of_store(settings, len(keys), written, complete=True).write(folder / MANIFEST)
    return Datastore.open(folder)


def _settings(
    keys: npt.NDArray[Any], values: npt.NDArray[Any], vocabulary: int | None, key_dtype: str | None, per_shard: int
) -> Settings:
    if keys.ndim != 2 or keys.dtype.kind != "f" or not keys.size:
        raise UsageError(f"keys: {keys.dtype} {list(keys.shape)}; give floats [N, D], at least one")
    if values.shape != keys.shape[:1] or values.dtype.kind not in "iu":
        raise UsageError(f"values: {values.dtype} {list(values.shape)}; give ints [{len(keys)}], one for each key")
    if key_dtype not in (None, "float16", "float32"):
        raise UsageError(f"key_dtype={key_dtype!r}: must be 'float16' or 'float32'")
    if per_shard < 1:
        raise UsageError(f"rows_per_shard={per_shard}: must be at least 1")
    least, most = int(values.min()), int(values.max())
    size = most + 1 if vocabulary is None else vocabulary
    if not 0 <= least <= most < min(size, 1 << 31):
        raise UsageError(f"values: {least} to {most}; they are ids from 0 to {min(size, 1 << 31) - 1}")
    return Settings(
        split="", tap="", context_window=0, block=per_shard, batch_blocks=1, rows_per_shard=per_shard,
        key_dtype=key_dtype or ("float16" if keys.dtype == np.float16 else "float32"), width=keys.shape[1],
        vocabulary=size, model="", dictionary="", tokens="",
    )  # fmt: skip


def _refuse_foreign(folder: Path, settings: Settings) -> None:
    """DistlmError for a folder that holds anything but what a killed start of the same has left."""
    held = [item.name for item in folder.iterdir() if not item.name.startswith(".")]
    if not held:
        return
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        if not manifest.complete and not manifest.settings.differences(settings):
            return
    raise DistlmError(f"{folder}: not empty ({', '.join(sorted(held)[:3])}); give another folder")


def _remove(folder: Path) -> None:
    """Remove the shards of a folder that is this store's, whole or half written."""
    clear(folder)
    for pattern in ("keys-*.npy", "values-*.npy"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _planned(settings: Settings, total: int, first: int) -> Shard:
    rows, number = min(settings.rows_per_shard, total - first), first // settings.rows_per_shard
    return planned_shard(ShardPlan(number, number, number + 1, first, rows, first, first + rows))


def _write(folder: Path, settings: Settings, shard: Shard, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> Shard:
    import torch

    from distlm.datastore.shard_writer import ShardWriter

    limit = float(np.finfo(settings.key_dtype).max)
    with ShardWriter(folder, settings, shard) as writer:
        step, end = max(1, _PIECE_BYTES // (4 * settings.width)), shard.first_row + shard.rows
        for first in range(shard.first_row, end, step):
            rows = slice(first, min(first + step, end))
            piece = np.array(keys[rows], np.float32)
            # A NaN fails the comparison, too.
            bad = np.flatnonzero(~(np.abs(piece) <= limit).all(axis=1))
            if len(bad):
                raise DistlmError(
                    f"keys: row {first + int(bad[0])} holds a number that is not finite or does not fit "
                    f"{settings.key_dtype} (largest {limit:.6g}); nothing was kept in {folder}"
                )
            writer.put(torch.from_numpy(piece), torch.from_numpy(np.array(values[rows], np.int64)))
    assert writer.finished is not None
    put_in_place(folder, settings, writer.finished)
    return writer.finished
