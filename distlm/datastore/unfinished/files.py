"""What lies in an unfinished store: files that several ranks fill, which units of them are written, how they get whole.

DATASTORE/
  .keys-00000.npy.part   .values-00000.npy.part    of their final size once the last unit is written; holes before
  .units.json            which units are written, with their checksums
A shard is whole with its sidecar, which is written first: then its two files are renamed, by the next start if need be.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import xxhash
from msgspec import structs

from distlm.datastore.manifest import SIDECARS, read_sidecar, shard_files, sidecar_path, write_sidecar
from distlm.datastore.plan import Unit
from distlm.datastore.records import Shard, UnitsFile
from distlm.datastore.settings import Settings
from distlm.runtime.files import sync_folder
from distlm.runtime.ranks.share import Share
from distlm.runtime.units.lost import lost_writes
from distlm.system_errors import told

UNITS = ".units*.json"
Hashes = list[str]
"""xxh3-128 of a unit's keys and of its values."""
Done = dict[str, Hashes]
"""Unit.key → its checksums."""
_CHUNK = 8 << 20


def part_path(path: Path) -> Path:
    """Where a file of a shard lies until the shard is whole."""
    return path.with_name(f".{path.name}.part")


def units_path(folder: Path, share: Share | None = None) -> Path:
    """The record of written units; each share has its own, as they run at once."""
    return folder / (".units.json" if share is None else f".units-{share.index}-of-{share.count}.json")


def seal(folder: Path, settings: Settings, shard: Shard) -> None:
    """Make a shard whole whose files are written and whose checksums are known."""
    write_sidecar(folder, settings, shard)
    put_in_place(folder, settings, shard)


def put_in_place(folder: Path, settings: Settings, shard: Shard) -> None:
    """Rename a shard's files; nothing where that was done."""
    moved = False
    for path, *_ in shard_files(folder, settings, shard):
        if part_path(path).exists():
            with told(path):
                part_path(path).replace(path)
            moved = True
    if moved:
        sync_folder(folder)


def kept_shard(folder: Path, settings: Settings, planned: Shard) -> Shard | None:
    """A whole shard with its checksums. What a start that was killed while it put its files in place has left is done
    first."""
    if sidecar_path(folder, planned.index).exists() and read_sidecar(folder, settings, planned, part_path):
        put_in_place(folder, settings, planned)
    return read_sidecar(folder, settings, planned)


def read_units(folder: Path, settings: Settings, share: Share | None) -> tuple[int, Done]:
    """Rows of a unit (0: nothing is recorded), and the units that are written. A share reads its own record and that of
    a run without shares, such a run those of all shares, too."""
    paths = sorted(folder.glob(UNITS)) if share is None else [units_path(folder), units_path(folder, share)]
    rows, done = 0, Done()
    for path in paths:
        record = UnitsFile.peek(path)
        if record is not None and record.store == settings.hash and rows in (0, record.unit_rows):
            rows = record.unit_rows
            done |= record.done
    return rows, done


def write_units(folder: Path, settings: Settings, share: Share | None, unit_rows: int, done: Done) -> None:
    """Record which units are written; call after their data is on the disk."""
    path = units_path(folder, share)
    UnitsFile(store=settings.hash, unit_rows=unit_rows, done=done).write(path)
    if share is None:
        # It holds the records of all shares. Theirs would still list a unit that is begun anew.
        for other in folder.glob(UNITS):
            if other != path:
                other.unlink(missing_ok=True)


def files_have_room(folder: Path, settings: Settings, shard: Shard, units: Iterable[Unit]) -> bool:
    """Whether both files of a shard are large enough to hold these units."""
    end = max((unit.first + unit.rows for unit in units), default=0)
    for path, header, size, _ in shard_files(folder, settings, shard):
        row_bytes = (size - len(header)) // shard.rows
        part = part_path(path)
        if not part.exists() or not len(header) + end * row_bytes <= part.stat().st_size <= size:
            return False
    return True


def forget(folder: Path, settings: Settings, shard: Shard) -> None:
    """Remove what there is of a shard that is not whole: half written files, and damaged ones, which need no room
    beside the new ones."""
    for path, *_ in shard_files(folder, settings, shard):
        part_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def begin(folder: Path, settings: Settings, shard: Shard) -> None:
    """Make the files of a shard anew, empty. On one rank, before others look for them: a network file system may
    remember for half a minute that a file was not there."""
    forget(folder, settings, shard)
    for path, *_ in shard_files(folder, settings, shard):
        part_path(path).touch()


def read_back(
    folder: Path, settings: Settings, shard: Shard, units: Sequence[Unit], done: Mapping[str, Hashes]
) -> Shard:
    """A shard with its checksums, whose units several ranks or starts have written: read once, in order.

    Raises DistlmError for a unit that is not what was written, and removes the shard's files: the next start makes it
    anew.
    """
    found = []
    for place, (path, header, size, _) in enumerate(shard_files(folder, settings, shard)):
        row_bytes = (size - len(header)) // shard.rows
        whole = xxhash.xxh3_128()
        with told(path, part_path(path)), part_path(path).open("rb") as stream:
            head = stream.read(len(header))
            wrong = head != header
            whole.update(head)
            for unit in units:
                digest, left = xxhash.xxh3_128(), unit.rows * row_bytes
                while left and (data := stream.read(min(_CHUNK, left))):
                    digest.update(data)
                    whole.update(data)
                    left -= len(data)
                wrong = wrong or digest.hexdigest() != done[unit.key][place]
            wrong = wrong or bool(stream.read(1))
        if wrong:
            forget(folder, settings, shard)
            raise lost_writes(path, "writes")
        found.append(whole.hexdigest())
    return structs.replace(shard, keys_hash=found[0], values_hash=found[1], done=True)


def clear(folder: Path) -> None:
    """Remove what only an unfinished store has."""
    for pattern in (SIDECARS, UNITS, ".*.npy.part"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
