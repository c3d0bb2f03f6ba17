"""A finished datastore, memory-mapped."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distlm.datastore.manifest import (
    file_problem,
    keys_path,
    read_manifest,
    shard_files,
    sidecar_path,
    store_bytes,
    values_path,
    write_anew,
    write_on,
)
from distlm.datastore.records import Manifest, Shard
from distlm.datastore.rows import Rows, read_rows
from distlm.errors import DistlmError
from distlm.runtime.checked import Written

__all__ = ["Datastore", "Shard"]


@dataclass(frozen=True)
class Datastore:
    """A finished store of N rows, memory-mapped: `keys, values = store[rows]`, `len(store)`, `Datastore.open(folder)`.

    Row i holds the key, float16 or float32 [D] (the hidden state that predicts), and the value, an int32 id (the token)
    of one token of the corpus (Khandelwal et al. 2020, §2). Rows are in corpus order: the key of row i + 1 is that of
    the next token.
    """

    folder: Path
    manifest: Manifest
    copies: Mapping[Path, Path] = field(default_factory=dict, kw_only=True, compare=False, repr=False)
    """File → where it is read instead: copies on this node's disk (runtime/local/)."""

    @classmethod
    def open(cls, folder: Path) -> "Datastore":
        """Open a finished store. File sizes and headers are checked, the contents are not read (see verify).

        Raises DistlmError when there is none, when it is unfinished, or when a file is missing or truncated.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest.complete:
            done = sum(sidecar_path(folder, shard.index).exists() for shard in manifest.shards)
            raise DistlmError(
                f"{folder}: unfinished datastore: {done} of {len(manifest.shards)} shards done; {write_on(manifest)}"
            )
        for shard in manifest.shards:
            for path, header, size, _ in shard_files(folder, manifest.settings, shard):
                if problem := file_problem(path, header, size):
                    raise DistlmError(f"{path}: {problem}; copy the file again, or {write_anew(manifest)}")
        return cls(folder, manifest)

    @property
    def rows(self) -> int:
        """N."""
        return self.manifest.rows

    def __len__(self) -> int:
        """N."""
        return self.rows

    def __getitem__(self, chosen: int | slice | npt.ArrayLike) -> Rows:
        """Keys [..., D], as stored, and values int32 [...] of rows by global number: an int, a slice, or an array of
        ints of any shape. A slice within a shard is a view of the files; of anything else what is asked for is copied.

        Raises IndexError for numbers outside 0..N−1, below zero too: −1 is what a search gives where there is no
        neighbour, not the last row.
        """
        return read_rows(self, chosen)

    @property
    def width(self) -> int:
        """D."""
        return self.manifest.width

    @property
    def key_dtype(self) -> np.dtype[np.floating]:
        """float16 or float32."""
        return np.dtype(self.manifest.key_dtype)

    @property
    def shards(self) -> list[Shard]:
        """In row order; shard i is shards[i]."""
        return self.manifest.shards

    @property
    def tap(self) -> str:
        """Hidden state that became the key."""
        return self.manifest.tap

    @property
    def vocabulary(self) -> int:
        """V: values are below it."""
        return self.manifest.vocabulary

    @property
    def model_fingerprint(self) -> str:
        """Of the model that made the keys."""
        return self.manifest.model

    @property
    def dictionary_hash(self) -> str:
        """Of the dictionary that the values are ids of."""
        return self.manifest.dictionary

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the store, contents included."""
        return self.manifest.fingerprint

    @property
    def bytes(self) -> int:
        """Bytes of all shard files."""
        return store_bytes(self.manifest.settings, self.manifest.shards)

    def keys(self, shard: int) -> np.memmap:
        """Keys of a shard, read-only: key_dtype [rows of the shard, D]."""
        return self._mapped(keys_path(self.folder, self.manifest.shards[shard].index))

    def values(self, shard: int) -> np.memmap:
        """Values of a shard, read-only: int32 [rows of the shard]."""
        return self._mapped(values_path(self.folder, self.manifest.shards[shard].index))

    def _mapped(self, path: Path) -> np.memmap:
        array: np.memmap = np.load(self.copies.get(path, path), mmap_mode="r")
        return array

    def written(self, keys: bool = True, shards: Collection[int] | None = None, values: bool = True) -> list[Written]:
        """The files of all shards, or of some, as they were written; keys=False: without the keys, values=False:
        without the values."""
        mend = f"copy it again, or {write_anew(self.manifest, delete=True)}"
        found = []
        for shard in self.shards if shards is None else [self.shards[number] for number in shards]:
            of_keys, of_values = shard_files(self.folder, self.manifest.settings, shard)
            found += [Written(path, hash, mend) for path, _, _, hash in [of_keys] * keys + [of_values] * values]
        return found

    def require_model(self, fingerprint: str) -> None:
        """DistlmError when the keys were made by another model than the one of this fingerprint."""
        if fingerprint != self.model_fingerprint:
            raise DistlmError(
                f"{self.folder}: datastore of another model (keys made by {self.model_fingerprint}, this one is "
                f"{fingerprint}); set datastore.checkpoint to the checkpoint it was made with, or write a datastore "
                "of this model in another run_dir="
            )

    def require_dictionary(
        self, dictionary_hash: str, mend: str = "set data.tokens_dir to the token files it was made from"
    ) -> None:
        """DistlmError when the values are ids of another dictionary; `mend`: what helps."""
        if dictionary_hash != self.dictionary_hash:
            raise DistlmError(
                f"{self.folder}: datastore of another dictionary (its values are ids of {self.dictionary_hash}, this "
                f"dictionary is {dictionary_hash}); {mend}"
            )
