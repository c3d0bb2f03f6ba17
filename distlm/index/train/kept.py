"""The centroids after each iteration of k-means, so that a killed training goes on from there."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distlm.index.layout import Array
from distlm.index.records import KmeansRecord
from distlm.runtime.files import atomic_path, file_hash

LEAST_S = 1.0
"""Iterations are not kept that took less than this since the last one that was: repeating them costs less."""
_NAME = ".kmeans"


@dataclass
class Kept:
    """State of one k-means in a folder; used on rank 0."""

    folder: Path
    key: str
    """Hash of everything that the centroids follow from."""
    _saved: float = field(default_factory=time.monotonic)

    @property
    def _record(self) -> Path:
        return self.folder / f"{_NAME}.json"

    def _centroids(self, iteration: int) -> Path:
        return self.folder / f"{_NAME}-{iteration}.npy"

    def load(self) -> tuple[int, Array] | None:
        """Iterations that are done, and the centroids fp32 [k, d] after them; None without a whole state of this
        k-means."""
        record = KmeansRecord.peek(self._record)
        if record is None or record.key != self.key:
            return None
        path = self._centroids(record.iterations)
        if not path.exists() or file_hash(path) != record.xxh3:
            return None
        centroids: Array = np.load(path, allow_pickle=False)
        return record.iterations, centroids

    def save(self, iterations: int, centroids: Array) -> None:
        """Keep them, unless the last were kept just now."""
        if time.monotonic() - self._saved < LEAST_S:
            return
        path = self._centroids(iterations)
        with atomic_path(path) as temporary:
            with temporary.open("wb") as stream:
                np.save(stream, centroids)
            xxh3 = file_hash(temporary)
        KmeansRecord(key=self.key, iterations=iterations, xxh3=xxh3).write(self._record)
        self._remove_centroids(path)
        self._saved = time.monotonic()

    def _remove_centroids(self, kept: Path) -> None:
        for path in _all_centroids(self.folder):
            if path != kept:
                path.unlink(missing_ok=True)


def remove_kept(folder: Path) -> None:
    """The index is trained: no state is needed any more."""
    (folder / f"{_NAME}.json").unlink(missing_ok=True)
    for path in _all_centroids(folder):
        path.unlink(missing_ok=True)


def _all_centroids(folder: Path) -> Iterator[Path]:
    return folder.glob(f"{_NAME}-*.npy")
