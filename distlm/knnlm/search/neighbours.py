"""Search results as files, so that λ, temperature and k are tuned offline in seconds.

RUN/neighbours/LABEL/SPLIT/
  plan.json       what is being searched for; a start with other inputs is refused (records.py)
  unit-00000/     queries [q, D] (the keys' dtype), targets int32 [q], log_probs fp64 [q] (of the LM), ids int64 [q, k],
                  distances fp32 [q, k] (squared L2; with knn.similarity=dot how much less the dot product is than the
                  row's greatest), values int32 [q, k]: .npy files; unit.json (rows and checksums)
  manifest.json   plan and units; written last: its presence says that the folder is whole

Rows of the units in order are the split's tokens in order. In each row the neighbours stand nearest first, ties by
id; where fewer than k were found the last ids are −1, with value −1 and distance inf.
While distances are being recomputed there are also found/ (units with the index's distances) and rescore/.
Where fewer neighbours are asked for than were searched, each row's first ones answer.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from distlm.config.schema import KnnConfig
from distlm.errors import DistlmError
from distlm.knnlm.search.records import NeighboursManifest, NeighboursPlan, UnitFacts, UnitFile
from distlm.runtime.checked import Written
from distlm.runtime.files import file_hash, json_hash, load_array, save_array, sync_file, sync_folder
from distlm.runtime.question import asked_of_search
from distlm.runtime.rundir import RunDir
from distlm.system_errors import refuse, told

MANIFEST, PLAN, UNIT = "manifest.json", "plan.json", "unit.json"
ARRAYS = ("queries", "targets", "log_probs", "ids", "distances", "values")


@dataclass(frozen=True)
class Unit:
    """One unit's arrays, memory-mapped or in memory: see the module's docstring for shapes and dtypes."""

    queries: npt.NDArray[np.floating]
    targets: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float64]
    ids: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    values: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.targets)


def unit_folder(parent: Path, number: int) -> Path:
    """Folder of a unit; it exists only when the unit is whole."""
    return parent / f"unit-{number:05d}"


def write_unit(folder: Path, unit: Unit) -> None:
    """Write a unit; the folder is whole or absent. Raises DistlmError when the disk is full."""
    write_arrays(folder, {name: getattr(unit, name) for name in ARRAYS})


def write_arrays(folder: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays of equally many rows and unit.json beside their place and rename them there.

    The folder is whole or absent. Raises DistlmError when the disk is full.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with told(folder, temporary):
            hashes = {}
            for name, array in arrays.items():
                path = temporary / f"{name}.npy"
                save_array(path, array)
                sync_file(path)
                hashes[name] = file_hash(path)
            UnitFile(rows=len(next(iter(arrays.values()))), hashes=hashes).write(temporary / UNIT)
            temporary.rename(folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_unit(folder: Path) -> Unit:
    """A unit's arrays, memory-mapped. Raises DistlmError when a file is missing or cut."""
    arrays = {}
    for name in ARRAYS:
        path = folder / f"{name}.npy"
        try:
            arrays[name] = load_array(path)
        except (OSError, ValueError) as error:
            refuse(error, path)
            raise DistlmError(
                f"{path}: missing or cut ({error}); remove {folder.parent} and run `distlm knn search` again"
            ) from error
    return Unit(**arrays)


def sweep(folder: Path) -> None:
    """Remove what killed writers left behind; call on one rank before the others write."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def first_of(manifest: NeighboursManifest, folder: Path, knn: KnnConfig) -> NeighboursManifest:
    """The manifest with the k that is asked for. Raises DistlmError where another question was answered."""
    for key, value in asked_of_search(knn).items():
        if (found := getattr(manifest, key) or ("l2" if key == "similarity" else None)) != value:
            raise DistlmError(f"{folder}: searched with {key} {found}, knn.{key}={value}; use knn.{key}={found}")
    if knn.candidates and (found := manifest.candidates or manifest.k) < max(knn.k, knn.candidates):
        raise DistlmError(f"{folder}: of {found} candidates, knn.candidates={knn.candidates}; use knn.candidates=0")
    if manifest.k > knn.k and knn.similarity == "dot":
        raise DistlmError(
            f"{folder}: holds {manifest.k} neighbours of each token, by their dot product: the first {knn.k} are not "
            f"those of knn.k={knn.k}; use knn.k={manifest.k}"
        )
    if manifest.k < knn.k:
        raise DistlmError(
            f"{folder}: holds {manifest.k} neighbours of each token, knn.k={knn.k}; use knn.k={manifest.k}"
        )
    return manifest if manifest.k == knn.k else replace(manifest, k=knn.k)


def begun(folder: Path) -> NeighboursPlan | None:
    """The search that was finished or begun in a folder; None where there is none.

    What a start has taken by default holds for those that follow, whatever their version takes.
    """
    for name, kind in ((MANIFEST, NeighboursManifest), (PLAN, NeighboursPlan)):
        if (folder / name).is_file():
            return kind.read(folder / name)
    return None


@dataclass(frozen=True)
class Neighbours:
    """The finished search results of one split."""

    folder: Path
    manifest: NeighboursManifest
    """`k` neighbours of each token are read."""
    searched: int = 0
    """Neighbours of each token that there are, where only the first k of them are read; 0: those."""
    lent: bool = False
    """Their folder was named (knn.folder): they may be another run's."""

    @classmethod
    def asked(cls, run: RunDir, split: str, knn: KnnConfig) -> "Neighbours":
        """Open those that answer a question: its own, or the first of a larger k.

        Raises DistlmError as `open`, and for a folder (knn.folder) in which something else was searched for.
        """
        found = cls.open(run.kept_neighbours(split))
        manifest = first_of(found.manifest, found.folder, knn)
        searched = found.k if manifest.k < found.k else 0
        return changed(found, manifest=manifest, searched=searched, lent=bool(knn.folder))

    @classmethod
    def open(cls, folder: Path) -> "Neighbours":
        """Open a finished folder; the arrays are memory-mapped when they are used.

        Raises DistlmError when the folder is missing, unfinished or of another format, or when a unit is missing or
        has another number of rows than the manifest says.
        """
        path = folder / MANIFEST
        if not path.is_file():
            state = "the search has not finished" if (folder / PLAN).is_file() else "no search results"
            raise DistlmError(f"{folder}: {state} (no {MANIFEST}); run `distlm knn search`")
        neighbours = cls(folder, NeighboursManifest.read(path))
        for number, facts in enumerate(neighbours.manifest.units):
            found = len(read_unit(unit_folder(folder, number)))
            if found != facts.rows:
                raise DistlmError(
                    f"{unit_folder(folder, number)}: {found} rows, {MANIFEST} says {facts.rows}; remove {folder} "
                    "and run `distlm knn search` again"
                )
        return neighbours

    @property
    def tokens(self) -> int:
        """Evaluated tokens Q."""
        return self.manifest.tokens

    @property
    def k(self) -> int:
        """Neighbours of each token."""
        return self.manifest.k

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the manifest, which holds the hash of every array."""
        return json_hash(self.manifest.tree())

    def units(self) -> Iterator[Unit]:
        """The units in order of the split's tokens."""
        for number in range(len(self.manifest.units)):
            unit, k = read_unit(unit_folder(self.folder, number)), self.k
            yield changed(unit, ids=unit.ids[:, :k], distances=unit.distances[:, :k], values=unit.values[:, :k])

    def log_probs(self) -> npt.NDArray[np.float64]:
        """The LM's log-probability of every token, in order: fp64 [Q]."""
        return np.concatenate([np.asarray(unit.log_probs) for unit in self.units()])

    def targets(self) -> npt.NDArray[np.int32]:
        """The tokens, in order: int32 [Q]."""
        return np.concatenate([np.asarray(unit.targets) for unit in self.units()])

    def sample(self, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float64]]:
        """Queries fp32 [n, D], targets and the LM's log-probabilities of tokens spread evenly; at most all."""
        places = np.unique(np.linspace(0, self.tokens - 1, min(count, self.tokens)).astype(np.int64))
        queries, targets, log_probs, first = [], [], [], 0
        for unit in self.units():
            own = places[(places >= first) & (places < first + len(unit))] - first
            queries.append(np.asarray(unit.queries[own], np.float32))
            targets.append(np.asarray(unit.targets[own]))
            log_probs.append(np.asarray(unit.log_probs[own]))
            first += len(unit)
        return np.concatenate(queries), np.concatenate(targets), np.concatenate(log_probs)

    def require(self, where: str, **facts: object) -> None:
        """Raises DistlmError when these results were made from something else: `facts` are fields of the manifest as
        `where` has them."""
        mend = "name another knn.folder, or leave it out" if self.lent else f"remove {self.folder}"
        for key, value in facts.items():
            if (found := getattr(self.manifest, key)) != value:
                raise DistlmError(
                    f"{self.folder / MANIFEST}: {key} {found}, {where} has {value}: the neighbours belong "
                    f"to another {key}; {mend} and run `distlm knn search` again"
                )

    def written(self) -> list[Written]:
        """All arrays as they were written."""
        return written_units(self.folder, self.manifest.units, "distlm knn search")


def written_units(folder: Path, units: Sequence[UnitFacts], command: str) -> list[Written]:
    """The arrays of a finished folder of units as they were written by `command`."""
    mend = f"remove {folder} and run `{command}` again"
    return [
        Written(unit_folder(folder, number) / f"{name}.npy", digest, mend)
        for number, facts in enumerate(units)
        for name, digest in facts.hashes.items()
    ]
