"""Records: what one stage hands to another on disk as JSON, each one typed class, decoded strictly.

A room's `records.py` defines its own; docs/files.md is made from all of them (distlm/files_page.py).
"""

import json
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from distlm.errors import DistlmError
from distlm.runtime.files import json_hash, json_of, read_json, unreadable, write_json

_R = TypeVar("_R", bound="Record")
_T = TypeVar("_T")


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """A piece of a record: typed and strict like it, without a file of its own."""


CHECK = "check"
"""The entry of a record's file that has its checksum."""


class Record(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One JSON file.

    The string under a field says what it is, with its unit. `format` rises by one whenever the meaning or the fields
    change; files from before there was a number are format 1. `check`, the last entry of a file, is the checksum of the
    others (`checksum`); older files have none.
    """

    FILE: ClassVar[str]
    """Where it lies, e.g. RUN/datastore/manifest.json."""
    WHAT: ClassVar[str]
    """What it is, for errors: "datastore manifest"."""
    WRITER: ClassVar[str]
    """The command that writes it."""
    READERS: ClassVar[tuple[str, ...]]
    """The commands that read it."""
    FORMAT: ClassVar[int] = 1
    MEND: ClassVar[str] = "delete it and run the stage again"
    """What helps when the file is cut or not what it should be."""

    format: int = 1
    """Number of this format."""

    @classmethod
    def upgraded(cls, tree: dict[str, Any]) -> dict[str, Any] | None:
        """The content of a file of an older format in the present one; None: this version cannot read it."""
        return None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check. Raises DistlmError naming the file, and the field of what is wrong."""
        return cls.of_file(read_json(path, cls.WHAT), path)

    @classmethod
    def peek(cls, path: Path) -> Self | None:
        """The record where there is one that can be read; None while it is missing or just being written."""
        try:
            return cls.of_file(json_of(path.read_text("utf-8")), path) if path.is_file() else None
        except (OSError, ValueError, DistlmError):
            return None

    @classmethod
    def of_file(cls, tree: Any, path: Path) -> Self:
        """The record of all of the JSON of the file `path`. Raises DistlmError as `read`."""
        if not isinstance(tree, dict) or CHECK not in tree:
            return cls.of(tree, path)
        rest = {name: value for name, value in tree.items() if name != CHECK}
        # What is missing or of another type is named first.
        record = cls.of(rest, path)
        if tree[CHECK] != checksum(rest):
            raise DistlmError(
                f"{path}: {cls.WHAT}: its content is not what its checksum was made of: a byte has changed, or it was "
                f"edited (then remove the entry {CHECK!r} as well); {cls.MEND}"
            )
        return record

    @classmethod
    def of(cls, tree: Any, path: Path) -> Self:
        """The record of JSON that was read from `path`, without its checksum. Raises DistlmError as `read`."""
        if isinstance(tree, dict):
            found = tree.get("format", 1)
            if found != cls.FORMAT:
                older = cls.upgraded(tree) if isinstance(found, int) and found < cls.FORMAT else None
                if older is None:
                    raise DistlmError(
                        f"{path}: {cls.WHAT} of format {found}, this version of distlm reads {cls.FORMAT}; use the "
                        "version that wrote it (code.json of the run names it) or make it again"
                    )
                tree = {**older, "format": cls.FORMAT}
        if found := unreadable(tree):
            raise DistlmError(f"{path}: not a valid {cls.WHAT}: {found}; {cls.MEND}")
        try:
            return msgspec.convert(tree, cls)
        except msgspec.ValidationError as error:
            raise DistlmError(f"{path}: not a valid {cls.WHAT}: {error}; {cls.MEND}") from error

    def write(self, path: Path) -> None:
        """Write atomically; equal records give equal bytes."""
        self.format = self.FORMAT
        tree = self.tree()
        write_json(path, {**tree, CHECK: checksum(tree)})

    def line(self) -> str:
        """As one line, for files of lines and those that are rewritten every few seconds."""
        self.format = self.FORMAT
        return json.dumps(self.tree())

    def tree(self) -> dict[str, Any]:
        """As dicts, lists and numbers, `format` first, the other fields in their order.

        Optional fields (`x: T | UnsetType = UNSET`) that are unset are left out.
        """
        built: dict[str, Any] = msgspec.to_builtins(self)
        return {"format": built.pop("format"), **built}


def checksum(tree: dict[str, Any]) -> str:
    """Of the entries of a record's file but `check`: xxh3-128 of them as JSON with sorted keys."""
    return json_hash(tree)


def replaced(record: _R, **changes: Any) -> _R:
    """A copy with other values in some fields."""
    return msgspec.structs.replace(record, **changes)


def given(value: _T | UnsetType) -> _T:
    """An optional field that is known to be there."""
    assert not isinstance(value, UnsetType)
    return value


def all_or_none(record: msgspec.Struct, *fields: str) -> None:
    """For `__post_init__`: optional fields that are there together or not at all.

    Raises ValueError, which `Record.read` turns into its own error.
    """
    written = {field.name: field.encode_name for field in msgspec.structs.fields(record)}
    absent = [written[name] for name in fields if getattr(record, name) is UNSET]
    if absent and len(absent) < len(fields):
        there = next(written[name] for name in fields if getattr(record, name) is not UNSET)
        raise ValueError(f"Object missing field `{absent[0]}`, which goes with `{there}`")


class RankAlive(Record):
    """A rank's sign of life, rewritten every few seconds while its stage runs."""

    FILE = "RUN/.alive/START/rank-NNNNN.json"
    WHAT = "sign of life of a rank"
    WRITER = "every stage on several ranks"
    READERS = ("the other ranks of the stage",)

    rank: int
    """Number of the rank, from 0."""
    node: str
    """Name of the machine that it runs on."""
    pid: int
    """Its process there."""
    started: str
    """When that process started, in the kernel's ticks since boot; empty: not known."""
    beat: int
    """How often this file was written; a number that stands still is silence."""
    ended: bool
    """The rank ended in order: its silence means nothing from now on."""


class RankLost(Record):
    """Which rank was found dead, by the first that noticed: all others report that and end."""

    FILE = "RUN/.alive/START/lost.json"
    WHAT = "report of a lost rank"
    WRITER = "every stage on several ranks"
    READERS = ("the other ranks of the stage",)

    rank: int
    """Number of the lost rank, from 0."""
    text: str
    """What is known of it, for people."""
    exit_code: int
    """How the ranks end that are left over."""


class CodeVersion(Part):
    """Which code made a result."""

    distlm: str
    """Version of distlm."""
    git: str | None
    """Its commit (`git describe --always --dirty`); null outside of a repository."""
    python: str
    """Version of Python."""
    libraries: dict[str, str]
    """Library → version, of those that are installed."""


class RunCode(Record):
    """The code that ran the latest stage of a run."""

    FILE = "RUN/code.json"
    WHAT = "version of the code"
    WRITER = "every stage"
    READERS = ()

    distlm: str
    """Version of distlm."""
    git: str | None
    """Its commit (`git describe --always --dirty`); null outside of a repository."""
    python: str
    """Version of Python."""
    libraries: dict[str, str]
    """Library → version, of those that are installed."""


class CodeSnapshot(Record):
    """Where a copy of the code in a run directory came from."""

    FILE = "RUN/code/HASH/VERSION.json"
    WHAT = "version of the code's snapshot"
    WRITER = "distlm submit"
    READERS = ("every stage that runs from the copy",)

    git: str | None
    """Commit of the code that was copied; null outside of a repository."""
    source: str = msgspec.field(name="tree")
    """Folder that it was copied from."""


class BestCheckpoint(Record):
    """Name of the checkpoint with the lowest validation loss."""

    FILE = "RUN/checkpoints/best.json"
    WHAT = "name of the best checkpoint"
    WRITER = "distlm train"
    READERS = ("distlm datastore write", "distlm evaluate", "distlm knn search", "distlm knn cache")
    MEND = "delete it and run `distlm train` again, which writes it anew"

    checkpoint: str
    """Folder below RUN/checkpoints."""
    valid_loss: float
    """Its validation loss in nats per token."""


class Speed(Part):
    """How long a stage took from its beginning to its end, in one start."""

    stage: str
    """Its verb."""
    machine: str
    """Processor, cores and GPU."""
    kind: str
    """model.kind."""
    settings: str
    """Hash of the settings that decide the speed."""
    ranks: int
    """Ranks of the stage."""
    planned_s: float
    """Seconds as its plan counted them."""
    worked_s: float
    """Seconds that its work took."""
    start_s: float
    """Seconds around it: the start of its processes and their end."""
    at: int
    """When it ended, Unix seconds."""


class SpeedsFile(Record):
    """How long stages took on the machines of a user, for the plans of later ones."""

    FILE = "~/.cache/distlm/speeds.json"
    WHAT = "speeds of stages"
    WRITER = "distlm run, distlm plan --measure"
    FORMAT = 2
    READERS = ("distlm run", "distlm plan")
    MEND = "delete it"

    stages: list[Speed]
    """The newest last."""
    flops: dict[str, float]
    """Machine → FLOP/s that its plans count with, measured once."""

    @classmethod
    def upgraded(cls, tree: dict[str, Any]) -> dict[str, Any]:
        # Plans of format 1 gave every rank all cores of the machine.
        return {"stages": [], "flops": {}}


class CheckedFile(Part):
    """A file whose bytes were found to be those that were written."""

    name: str
    """Below the folder."""
    bytes: int
    """Its size."""
    changed_ns: int
    """When it was last changed, Unix nanoseconds."""
    inode: int
    """Its number in the file system."""
    hash: str
    """xxh3-128 of its bytes."""
    at: int
    """When it was read for that, Unix seconds."""


class CheckedFolder(Record):
    """Files of a folder that were compared with their checksums, so that they need not be read for it again."""

    FILE = "~/.cache/distlm/checked/HASH.json"
    WHAT = "files that were found whole"
    WRITER = "every stage that reads large files"
    READERS = ("the same stages",)
    MEND = "delete it"

    folder: str
    """Absolute."""
    files: list[CheckedFile]
    """That were read lately."""
