"""Folders that a stage fills unit by unit, in any order and over any number of starts.

FOLDER/
  plan.json       what the results are made from; a start with other inputs is refused (records.py)
  unit-00000/     arrays (.npy) and unit.json (rows and checksums), whole or absent
  manifest.json   plan and units; written last: its presence says that the folder is whole
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy.typing as npt

from distlm.errors import DistlmError
from distlm.knnlm.search.neighbours import MANIFEST, PLAN, UNIT, sweep, unit_folder, write_arrays
from distlm.knnlm.search.records import UnitFacts, UnitFile
from distlm.runtime.files import bytes_below, load_array, require_free_disk
from distlm.runtime.records import Record
from distlm.system_errors import refuse


class Filled(Protocol):
    """Manifest of a finished folder."""

    @property
    def units(self) -> list[UnitFacts]:
        """Its units in order."""


M = TypeVar("M", bound=Filled)


@dataclass(frozen=True)
class UnitFolder:
    """A folder being filled; no method is collective."""

    folder: Path
    plan: Record
    manifest: type[Record]
    """The plan's fields and `units`."""
    units: int
    command: str
    """What fills it, for messages."""
    measured: tuple[str, ...] = ()
    """Entries of the plan that are no input: another start may find other values."""
    setting: str = ""
    """The setting that names the folder, whose results may be another run's; empty: it is this run's own."""

    @property
    def is_whole(self) -> bool:
        """Nothing is left to do."""
        return (self.folder / MANIFEST).exists()

    def check_before(self) -> None:
        """Rank 0, before any work: the folder is ours."""
        for name, kind in ((PLAN, type(self.plan)), (MANIFEST, self.manifest)):
            path = self.folder / name
            if path.exists():
                self._refuse_other(path, kind.read(path))

    def begin(self) -> None:
        """Rank 0: claim the folder and remove what killed writers left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        self.plan.write(self.folder / PLAN)

    def is_written(self, number: int) -> bool:
        """A unit is final."""
        return unit_folder(self.folder, number).exists()

    def write(self, number: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write a unit; every array has one row per token."""
        write_arrays(unit_folder(self.folder, number), arrays)

    def finish(self) -> None:
        """Rank 0: the manifest, last."""
        files = [UnitFile.read(unit_folder(self.folder, number) / UNIT) for number in range(self.units)]
        units = [{"rows": file.rows, "hashes": file.hashes} for file in files]
        path = self.folder / MANIFEST
        self.manifest.of({**self.plan.tree(), "units": units}, path).write(path)

    def _refuse_other(self, path: Path, before: Record) -> None:
        old, new = before.tree(), self.plan.tree()
        for key in self.plan.__struct_encode_fields__:
            if key not in self.measured and old.get(key) != new.get(key):
                own = (
                    f"remove {self.folder} (`distlm clean RUN_DIR search` removes all such) and run `{self.command}` "
                    "again"
                )
                raise DistlmError(
                    f"{path}: {key} was {old.get(key)!r} and is {new.get(key)!r} now: this folder holds results of "
                    f"another {key}; " + (f"name another {self.setting}, or leave it out" if self.setting else own)
                )


def require_room(folders: Sequence[Path], needed: int, command: str) -> None:
    """Rank 0, before any work: the disk has room for the `needed` bytes of unfinished folders together, of which their
    arrays that are there already take some. Raises DistlmError where it has not."""
    if folders:
        there = sum(bytes_below(folder, ".npy") for folder in folders)
        require_free_disk(folders[0], max(0, needed - there), f"`{command}`")


def read_manifest(folder: Path, read: Callable[[Path], M], command: str) -> M:
    """Manifest of a finished folder, as `read` gives it.

    Raises DistlmError when it is missing or unfinished, when a unit is missing, and as `read`.
    """
    path = folder / MANIFEST
    if not path.is_file():
        state = "not finished" if (folder / PLAN).is_file() else "nothing there"
        raise DistlmError(f"{folder}: {state} (no {MANIFEST}); run `{command}`")
    manifest = read(path)
    for number, facts in enumerate(manifest.units):
        for name in facts.hashes:
            if not (file := unit_folder(folder, number) / f"{name}.npy").is_file():
                raise DistlmError(f"{file}: missing; remove {folder} and run `{command}` again")
    return manifest


def read_array(folder: Path, manifest: Filled, number: int, name: str) -> npt.NDArray[Any]:
    """One array of one unit, memory-mapped. Raises DistlmError when it is cut or has other rows."""
    path, rows = unit_folder(folder, number) / f"{name}.npy", manifest.units[number].rows
    try:
        array: npt.NDArray[Any] = load_array(path)
    except (OSError, ValueError) as error:
        refuse(error, path)
        raise DistlmError(f"{path}: missing or cut ({error}); remove {folder} and make it again") from error
    if len(array) != rows:
        raise DistlmError(f"{path}: {len(array)} rows, {MANIFEST} says {rows}; remove {folder} and make it again")
    return array


def read_arrays(folder: Path, manifest: Filled, name: str) -> Iterator[npt.NDArray[Any]]:
    """One array of every unit in order; otherwise as read_array."""
    for number in range(len(manifest.units)):
        yield read_array(folder, manifest, number, name)
