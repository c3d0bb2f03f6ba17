"""docs/files.md from the records: `python -m distlm.files_page > docs/files.md`. A test compares the two."""

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import docstring_parser
import msgspec

from distlm.runtime.records import Part, Record

_HEAD = """# Files between the stages

What one stage hands to another as JSON. Made from the records in the code by `python -m distlm.files_page`; a test
compares. Every file has a `format`; a version that cannot read a format says so and names the file. Unknown, missing
and mistyped fields are refused by name. The last entry, `check`, is the xxh3-128 of the others (as JSON with sorted
keys): a file in which a byte has changed is refused. Whoever edits a file by hand removes it.
"""


def records() -> list[type[Record]]:
    """Every record of distlm and launchers, by the file it describes."""
    found: set[type[Record]] = set()
    for package in ("distlm", "launchers"):
        for entry in pkgutil.walk_packages(import_module(package).__path__, f"{package}."):
            if entry.name.endswith(".records"):
                found |= {kind for kind in _classes(entry.name) if issubclass(kind, Record) and hasattr(kind, "FILE")}
    return sorted(found, key=lambda kind: (kind.FILE, kind.__name__))


def page() -> str:
    """The page as Markdown."""
    lines = [_HEAD]
    for kind in records():
        lines += [f"## `{kind.FILE}`", "", _text(kind), ""]
        readers = ", ".join(map(_who, kind.READERS)) or "people"
        lines += [f"Written by {_who(kind.WRITER)}, read by {readers}. Format {kind.FORMAT}.", ""]
        lines += [*_table(kind)]
        for part in _parts(kind, set()):
            lines += [f"**{part.__name__}**: {_text(part)}", "", *_table(part)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _classes(module: str) -> Iterator[type[msgspec.Struct]]:
    for _, kind in inspect.getmembers(import_module(module), inspect.isclass):
        if kind.__module__ == module and issubclass(kind, msgspec.Struct):
            yield kind


def _who(reader: str) -> str:
    return f"`{reader}`" if reader.startswith(("distlm ", "python ")) else reader


def _text(kind: type[msgspec.Struct]) -> str:
    return " ".join((docstring_parser.parse_from_object(kind).description or "").split())


def _table(kind: type[msgspec.Struct]) -> list[str]:
    told = {entry.arg_name: entry for base in reversed(kind.__mro__[:-1]) for entry in _params(base)}
    lines = ["| field | type | meaning |", "|---|---|---|"]
    for field in sorted(msgspec.structs.fields(kind), key=lambda field: field.name != "format"):
        described = told.get(field.name)
        meaning = " ".join((described.description or "").split()) if described else ""
        lines.append(f"| `{field.encode_name}` | {_type(field.type)} | {meaning.replace('|', chr(92) + '|')} |")
    return [*lines, ""]


def _params(kind: type) -> list[docstring_parser.DocstringParam]:
    try:
        return docstring_parser.parse_from_object(kind).params
    except (OSError, TypeError):
        return []


def _type(kind: Any) -> str:
    """A type in words: `list[float] or absent`."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is NoneType or kind is msgspec.UnsetType:
        return "null" if kind is NoneType else "absent"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(map(_type, inner))
    return f"{origin.__name__}[{', '.join(map(_type, inner))}]" if origin else str(getattr(kind, "__name__", kind))


def _parts(kind: type[msgspec.Struct], seen: set[type]) -> Iterator[type[msgspec.Struct]]:
    for field in msgspec.structs.fields(kind):
        for inner in _structs(field.type):
            if inner not in seen:
                seen.add(inner)
                yield inner
                yield from _parts(inner, seen)


def _structs(kind: object) -> Iterator[type[msgspec.Struct]]:
    if isinstance(kind, type) and issubclass(kind, Part):
        yield kind
    for inner in getattr(kind, "__args__", ()):
        yield from _structs(inner)


if __name__ == "__main__":
    print(page(), end="")
