"""Records: what one stage hands to another on disk as JSON, each one typed class, decoded strictly.

A room's `records.py` defines its own; docs/files.md is made from all of them (distlm/files_page.py).
"""

import json
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import msgspec

from distlm.errors import DistlmError
from distlm.runtime.files import read_json, write_json

_R = TypeVar("_R", bound="Record")


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """A piece of a record: typed and strict like it, without a file of its own."""


class Record(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One JSON file.

    The string under a field says what it is, with its unit. `format` rises by one whenever the meaning or the fields
    change; files from before there was a number are format 1.
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
        return cls.of(read_json(path, cls.WHAT), path)

    @classmethod
    def peek(cls, path: Path) -> Self | None:
        """The record where there is one that can be read; None while it is missing or just being written."""
        try:
            return cls.of(json.loads(path.read_text("utf-8")), path)
        except (OSError, ValueError, DistlmError):
            return None

    @classmethod
    def of(cls, tree: Any, path: Path) -> Self:
        """The record of JSON that was read from `path`. Raises DistlmError as `read`."""
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
        try:
            return msgspec.convert(tree, cls)
        except msgspec.ValidationError as error:
            raise DistlmError(f"{path}: not a valid {cls.WHAT}: {error}; {cls.MEND}") from error

    def write(self, path: Path) -> None:
        """Write atomically; equal records give equal bytes."""
        self.format = self.FORMAT
        write_json(path, self.tree())

    def line(self) -> str:
        """As one line, for files of lines and those that are rewritten every few seconds."""
        self.format = self.FORMAT
        return json.dumps(self.tree())

    def tree(self) -> dict[str, Any]:
        """As dicts, lists and numbers; optional fields (`x: T | UnsetType = UNSET`) that are unset are left out."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        return built


def replaced(record: _R, **changes: Any) -> _R:
    """A copy with other values in some fields."""
    return msgspec.structs.replace(record, **changes)
