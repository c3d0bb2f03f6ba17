"""Every byte of a store against its checksum, every key finite, every value a word."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from distlm.datastore.manifest import (
    MANIFEST,
    VALUE_DTYPE,
    file_problem,
    read_manifest,
    shard_files,
    sidecar_path,
    store_bytes,
    write_anew,
    write_on,
)
from distlm.datastore.records import Manifest
from distlm.datastore.unfinished.files import UNITS, part_path
from distlm.errors import DistlmError
from distlm.runtime.lock import is_lock
from distlm.runtime.progress import Progress

_CHUNK_BYTES = 8 << 20


def verify_datastore(folder: Path) -> list[str]:
    """Read the whole store once, in pieces of 8 MB. Returns what is wrong, each with its file and kind; empty: whole.

    Kinds: missing, truncated, too long, header, checksum (a flipped byte), keys that are not finite, values outside
    the vocabulary, files that do not belong to the store, an unfinished or damaged manifest.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except DistlmError as error:
        return [str(error)]
    problems = []
    if not manifest.complete:
        problems.append(f"{folder / MANIFEST}: unfinished: {write_on(manifest)}")
    settings, expected = manifest.settings, {MANIFEST}
    with Progress("datastore verify", store_bytes(settings, manifest.shards), "bytes") as progress:
        for shard in manifest.shards:
            for path, header, size, checksum in shard_files(folder, settings, shard):
                expected.add(path.name)
                if not manifest.complete:
                    expected.add(part_path(path).name)
                if shard.done:
                    problems += _file_problems(path, header, size, checksum, manifest, progress)
            if not manifest.complete:
                expected.add(sidecar_path(folder, shard.index).name)
    if not manifest.complete:
        expected |= {path.name for path in folder.glob(UNITS)}
    extra = sorted(path.name for path in folder.iterdir() if path.name not in expected and not is_lock(path))
    problems += [f"{folder / name}: not a file of this store" for name in extra]
    return problems


def datastore_info(folder: Path) -> dict[str, object]:
    """What a store holds, finished or not, from its manifest alone. Raises DistlmError when there is none."""
    manifest = read_manifest(Path(folder))
    tree = manifest.tree()
    shards = manifest.shards
    done = [shard for shard in shards if shard.done or sidecar_path(Path(folder), shard.index).exists()]
    del tree["shards"]
    return {
        **tree,
        "shards": len(shards),
        "shards_done": len(done),
        "bytes": store_bytes(manifest.settings, shards),
        "fingerprint": manifest.fingerprint if manifest.complete else None,
    }


def _file_problems(
    path: Path, header: bytes, size: int, checksum: str, manifest: Manifest, progress: Progress
) -> list[str]:
    settings = manifest.settings
    if problem := file_problem(path, header, size):
        progress.advance(size)
        return [f"{path}: {problem}; copy it again, or {write_anew(manifest)}"]
    if path.name.startswith("keys"):
        found, bad = _read(path, len(header), np.dtype(settings.key_dtype), settings.width, _not_finite, progress)
        what = "keys that are not finite"
    else:
        found, bad = _read(path, len(header), VALUE_DTYPE, 1, partial(_no_word, settings.vocabulary), progress)
        what = f"a value outside 0..{settings.vocabulary - 1}"
    problems = []
    if found != checksum:
        problems.append(
            f"{path}: checksum {found}, the manifest says {checksum}: changed bytes; "
            f"{write_anew(manifest, delete=True)}"
        )
    if bad:
        problems.append(f"{path}: {what} in {len(bad)} rows, first in row {bad[0]}")
    return problems


def _not_finite(rows: np.ndarray) -> np.ndarray:
    """Keys [n, D] → bool [n], True for a row that cannot be right."""
    return ~np.isfinite(rows).all(axis=1)


def _no_word(vocabulary: int, rows: np.ndarray) -> np.ndarray:
    """Values [n, 1] → bool [n], True for a row that cannot be right."""
    return (rows[:, 0] < 0) | (rows[:, 0] >= vocabulary)


def _read(
    path: Path,
    header: int,
    dtype: np.dtype[Any],
    columns: int,
    is_bad: Callable[[np.ndarray], np.ndarray],
    progress: Progress,
) -> tuple[str, list[int]]:
    """(xxh3-128 of the file, numbers of the bad rows) in one pass."""
    digest, bad, first = xxhash.xxh3_128(), [], 0
    row_bytes = dtype.itemsize * columns
    with path.open("rb") as stream:
        data = stream.read(header)
        while data:
            digest.update(data)
            progress.advance(len(data))
            data = stream.read(max(1, _CHUNK_BYTES // row_bytes) * row_bytes)
            rows = np.frombuffer(data, dtype).reshape(-1, columns)
            bad += (first + np.flatnonzero(is_bad(rows))).tolist()
            first += len(rows)
    return digest.hexdigest(), bad
