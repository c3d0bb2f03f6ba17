"""What a datastore directory holds, as text: `manifest.json`, and a sidecar of each shard while it is being written.

The directory is a pure function of the settings: no times, hosts or rank counts.

DATASTORE/
  manifest.json                       complete=false from the start, complete=true last
  keys-00000.npy   values-00000.npy   [rows, D] float16 or float32, and [rows] int32
  .shard-00000.json                   the shard is whole; gone when the store is complete
What else an unfinished store has is in unfinished/files.py.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from distlm.datastore.plan import ShardPlan, StorePlan
from distlm.datastore.records import Manifest, Shard, Sidecar
from distlm.datastore.settings import Settings
from distlm.errors import DistlmError

MANIFEST, SIDECARS = "manifest.json", ".shard-*.json"
VALUE_DTYPE = np.dtype("<i4")


def planned_manifest(settings: Settings, plan: StorePlan) -> Manifest:
    """The manifest of a store of which nothing is written yet."""
    return Manifest.of_store(settings, plan.rows, [planned_shard(shard) for shard in plan.shards], complete=False)


def planned_shard(shard: ShardPlan) -> Shard:
    """A shard that is not written yet."""
    return Shard(shard.index, shard.first_row, shard.rows, shard.token_start, shard.token_end)


def read_manifest(folder: Path) -> Manifest:
    """manifest.json of a store. Raises DistlmError when it is missing, damaged, or of something else."""
    path = folder / MANIFEST
    if not path.exists():
        raise DistlmError(f"{folder}: no datastore here (no {MANIFEST}); run `distlm datastore write` first")
    return Manifest.read(path)


def write_on(manifest: Manifest) -> str:
    """What finishes an unfinished store."""
    if not manifest.tokens:
        return "call distlm.write_datastore again with the same arrays"
    return "run `distlm datastore write` again, or KnnLM.add with the same texts where that began it"


def write_anew(manifest: Manifest, delete: bool = False) -> str:
    """What makes a shard file of a finished store again. `delete`: it has its size, so that writing would keep it."""
    if not manifest.tokens:
        return "remove the folder and call distlm.write_datastore again"
    return f"{'delete it and ' * delete}{write_on(manifest)}: the damaged shard is written anew"


def is_complete(folder: Path) -> bool:
    """The store is there and whole, by its manifest. Raises DistlmError for one that is damaged."""
    return (folder / MANIFEST).exists() and read_manifest(folder).complete


def keys_path(folder: Path, index: int) -> Path:
    """Keys of a shard."""
    return folder / f"keys-{index:05d}.npy"


def values_path(folder: Path, index: int) -> Path:
    """Values of a shard."""
    return folder / f"values-{index:05d}.npy"


def sidecar_path(folder: Path, index: int) -> Path:
    """Marker of a whole shard in an unfinished store."""
    return folder / f".shard-{index:05d}.json"


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The bytes in front of a C-ordered array in a .npy file."""
    stream = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def shard_files(folder: Path, settings: Settings, shard: Shard) -> list[tuple[Path, bytes, int, str]]:
    """(path, header, size of the whole file in bytes, checksum) of a shard's keys and values."""
    key_dtype = np.dtype(settings.key_dtype)
    keys = npy_header((shard.rows, settings.width), key_dtype)
    values = npy_header((shard.rows,), VALUE_DTYPE)
    key_bytes, value_bytes = shard.rows * settings.width * key_dtype.itemsize, shard.rows * VALUE_DTYPE.itemsize
    return [
        (keys_path(folder, shard.index), keys, len(keys) + key_bytes, shard.keys_hash or ""),
        (values_path(folder, shard.index), values, len(values) + value_bytes, shard.values_hash or ""),
    ]


def store_bytes(settings: Settings, shards: Sequence[Shard]) -> int:
    """Bytes of the files of some shards."""
    return sum(size for shard in shards for _, _, size, _ in shard_files(Path(), settings, shard))


def file_problem(path: Path, header: bytes, size: int) -> str | None:
    """Why a file cannot be the shard file it should be, judged by its size and header alone; None when it can."""
    try:
        found = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(len(header))
    except FileNotFoundError:
        return "missing"
    if found != size:
        kind = "truncated" if found < size else "too long"
        return f"{kind}: {found} bytes, the manifest says {size}"
    return None if start == header else "its .npy header is not the one of this shard"


def write_sidecar(folder: Path, settings: Settings, shard: Shard) -> None:
    """Mark a shard as whole; call after its files are in place."""
    Sidecar.of_shard(settings, shard).write(sidecar_path(folder, shard.index))


def read_sidecar(
    folder: Path, settings: Settings, planned: Shard, other: Callable[[Path], Path] | None = None
) -> Shard | None:
    """The shard with its checksums when it is whole: sidecar of this store, files in place with the right sizes, or
    where `other` says."""
    path = sidecar_path(folder, planned.index)
    if not path.exists():
        return None
    try:
        sidecar = Sidecar.read(path)
    except DistlmError:
        return None
    shard = structs.replace(planned, keys_hash=sidecar.keys_hash, values_hash=sidecar.values_hash)
    if not shard.done or sidecar != Sidecar.of_shard(settings, shard):
        return None
    files = shard_files(folder, settings, shard)
    for path, header, size, _ in files:
        moved = other(path) if other else path
        if file_problem(moved if moved.exists() else path, header, size):
            return None
    return shard
