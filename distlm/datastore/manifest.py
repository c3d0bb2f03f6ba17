"""What a datastore directory holds, as text: `manifest.json`, and a sidecar of each shard while it is being written.

The directory is a pure function of the settings: no times, hosts or rank counts.

DATASTORE/
  manifest.json                       complete=false from the start, complete=true last
  keys-00000.npy   values-00000.npy   [rows, D] float16 or float32, and [rows] int32
  .shard-00000.json                   the shard is whole; gone when the store is complete
"""

import io
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distlm.datastore.plan import ShardPlan, StorePlan
from distlm.errors import DistlmError
from distlm.runtime.files import json_hash, read_json, write_json

KIND, FORMAT = "distlm datastore", 1
MANIFEST, SIDECARS = "manifest.json", ".shard-*.json"
VALUE_DTYPE = np.dtype("<i4")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the bytes of a store."""

    split: str
    tap: str
    context_window: int
    block: int
    batch_blocks: int
    rows_per_shard: int
    """Rounded down to whole batches."""
    key_dtype: str
    width: int
    vocabulary: int
    model: str
    """Fingerprint of the model (distlm.models.card.model_fingerprint)."""
    dictionary: str
    """Hash of the dictionary."""
    tokens: str
    """Fingerprint of the token files."""

    @property
    def hash(self) -> str:
        """What a shard's sidecar says it belongs to."""
        return json_hash(asdict(self))

    @property
    def rule(self) -> str:
        """The context rule in words."""
        return (
            f"the first {self.context_window} tokens are not stored; each stored token is seen with "
            f"{self.context_window} to {self.context_window + self.block - 1} tokens before it"
        )

    def differences(self, other: "Settings") -> list[str]:
        """'name: mine there, other's now' of each field that differs."""
        here, now = asdict(self), asdict(other)
        changed = [name for name in here if here[name] != now[name]]
        named = {name: f"datastore.{name}" for name in ("split", "tap", "context_window", "block", "batch_blocks")}
        named |= {name: f"datastore.{name}" for name in ("rows_per_shard", "key_dtype")}
        named |= {"model": "model (checkpoint)", "tokens": "token files"}
        return [f"{named.get(name, name)}: {here[name]!r} there, {now[name]!r} now" for name in changed]


@dataclass(frozen=True)
class Shard:
    """One shard of a store: rows [first_row, first_row + rows) are the tokens [token_start, token_end).

    The hashes are xxh3-128 of the whole .npy files; empty while the shard is not written.
    """

    index: int
    first_row: int
    rows: int
    token_start: int
    token_end: int
    keys_hash: str = ""
    values_hash: str = ""

    @property
    def done(self) -> bool:
        """The shard was written."""
        return bool(self.keys_hash and self.values_hash)


@dataclass(frozen=True)
class Manifest:
    """A store's settings and shards."""

    settings: Settings
    rows: int
    shards: tuple[Shard, ...]
    complete: bool

    @property
    def fingerprint(self) -> str:
        """Identifies the store: settings and the checksum of every file."""
        return json_hash(self.tree())

    def tree(self) -> dict[str, Any]:
        """The manifest as JSON."""
        settings = asdict(self.settings)
        context = {name: settings.pop(name) for name in ("context_window", "block", "batch_blocks")}
        shards = []
        for shard in self.shards:
            item = asdict(shard)
            hashes = {"keys_xxh3": item.pop("keys_hash") or None, "values_xxh3": item.pop("values_hash") or None}
            shards.append({**item, **hashes, "done": shard.done})
        return {
            "kind": KIND,
            "format": FORMAT,
            "complete": self.complete,
            "rows": self.rows,
            "value_dtype": "int32",
            **settings,
            "context": {**context, "rule": self.settings.rule},
            "shards": shards,
        }


def planned_manifest(settings: Settings, plan: StorePlan) -> Manifest:
    """The manifest of a store of which nothing is written yet."""
    return Manifest(settings, plan.rows, tuple(planned_shard(shard) for shard in plan.shards), False)


def planned_shard(shard: ShardPlan) -> Shard:
    """A shard that is not written yet."""
    return Shard(shard.index, shard.first_row, shard.rows, shard.token_start, shard.token_end)


def read_manifest(folder: Path) -> Manifest:
    """manifest.json of a store. Raises DistlmError when it is missing, damaged, or of something else."""
    path = folder / MANIFEST
    if not path.exists():
        raise DistlmError(f"{folder}: no datastore here (no {MANIFEST}); run `distlm datastore write` first")
    tree = read_json(path, "manifest of a datastore")
    if not isinstance(tree, dict) or tree.get("kind") != KIND:
        raise DistlmError(f"{path}: not the manifest of a datastore; choose another folder")
    if tree.get("format") != FORMAT:
        raise DistlmError(
            f"{path}: format {tree.get('format')!r}, this version of distlm reads {FORMAT}; write the datastore again"
        )
    try:
        settings = Settings(
            **{name: tree["context"][name] for name in ("context_window", "block", "batch_blocks")},
            **{name: tree[name] for name in ("split", "tap", "rows_per_shard", "key_dtype", "width", "vocabulary")},
            **{name: tree[name] for name in ("model", "dictionary", "tokens")},
        )
        fields = ("index", "first_row", "rows", "token_start", "token_end")
        shards = tuple(
            Shard(
                **{name: item[name] for name in fields},
                keys_hash=item["keys_xxh3"] or "",
                values_hash=item["values_xxh3"] or "",
            )
            for item in tree["shards"]
        )
        manifest = Manifest(settings, tree["rows"], shards, tree["complete"])
        _check_consistent(path, manifest)
    except (KeyError, TypeError) as error:
        raise DistlmError(
            f"{path}: field {error} is missing or of the wrong type; the file was edited or is damaged: remove the "
            "folder and write the datastore again"
        ) from error
    return manifest


def _check_consistent(path: Path, manifest: Manifest) -> None:
    row = 0
    for number, shard in enumerate(manifest.shards):
        if (shard.index, shard.first_row, shard.token_end - shard.token_start) != (number, row, shard.rows):
            raise DistlmError(f"{path}: shard {number} does not follow the one before it; write the datastore again")
        row += shard.rows
    if row != manifest.rows or (manifest.complete and not all(shard.done for shard in manifest.shards)):
        raise DistlmError(
            f"{path}: says {manifest.rows} rows, complete={manifest.complete}, and lists {row} rows in "
            f"{sum(shard.done for shard in manifest.shards)} written shards; write the datastore again"
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json atomically."""
    write_json(folder / MANIFEST, manifest.tree())


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
        (keys_path(folder, shard.index), keys, len(keys) + key_bytes, shard.keys_hash),
        (values_path(folder, shard.index), values, len(values) + value_bytes, shard.values_hash),
    ]


def store_bytes(settings: Settings, shards: tuple[Shard, ...] | list[Shard]) -> int:
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
    write_json(sidecar_path(folder, shard.index), {"store": settings.hash, **asdict(shard)})


def read_sidecar(folder: Path, settings: Settings, planned: Shard) -> Shard | None:
    """The shard with its checksums when it is whole: sidecar of this store, files in place with the right sizes."""
    path = sidecar_path(folder, planned.index)
    if not path.exists():
        return None
    try:
        tree = read_json(path, "sidecar of a shard")
        hashes = {"keys_hash": tree["keys_hash"], "values_hash": tree["values_hash"]}
        shard = replace(planned, **hashes)
        if tree != {"store": settings.hash, **asdict(shard)} or not shard.done:
            return None
    except (DistlmError, KeyError, TypeError):
        return None
    files = shard_files(folder, settings, shard)
    return None if any(file_problem(path, header, size) for path, header, size, _ in files) else shard
