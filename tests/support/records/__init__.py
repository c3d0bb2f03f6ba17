"""What must hold for every record of a room: round trip, files without a format, and each kind of fault refused."""

import copy
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from distlm.errors import DistlmError
from distlm.runtime.records import CHECK, Part, Record

Keys = tuple[str | int, ...]


def unsealed(path: Path, written: bytes | None = None) -> dict[str, Any]:
    """The entries of a record's file without its checksum: what a test may change and write as JSON."""
    tree: dict[str, Any] = json.loads(path.read_bytes() if written is None else written)
    tree.pop(CHECK, None)
    return tree


def alter(path: Path, **changes: Any) -> None:
    """A record's file as somebody else's, or as edited by hand: with other entries, and without a checksum."""
    path.write_text(json.dumps({**unsealed(path), **changes}), "utf-8")


def records_of(module: ModuleType) -> set[type[Record]]:
    """The records that a room's module defines."""
    kinds = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
    return {kind for kind in kinds if issubclass(kind, Record)}


def check_record(record: Record, path: Path) -> None:
    """Written and read it is the same, byte for byte, also from a file without a format; every fault is named."""
    kind = type(record)
    record.write(path)
    written = path.read_bytes()
    again = kind.read(path)
    assert again == record
    again.write(path)
    assert path.read_bytes() == written
    tree = json.loads(written)
    for name, value in tree.items():
        # A changed byte that leaves a valid record: found by the checksum alone.
        changed = value + 1 if type(value) is int else f"{value}x" if isinstance(value, str) else value
        if changed != value and name != "format":
            path.write_text(json.dumps({**tree, name: changed}), "utf-8")
            with pytest.raises(DistlmError) as caught:
                kind.read(path)
            assert str(path) in str(caught.value)
    tree = unsealed(path, written)
    path.write_text(json.dumps({name: value for name, value in tree.items() if name != "format"}), "utf-8")
    assert kind.read(path) == record
    path.write_bytes(written[:-4])
    with pytest.raises(DistlmError, match="not valid JSON") as cut:
        kind.read(path)
    assert str(path) in str(cut.value)
    for damaged, word in faults(record, tree):
        path.write_text(json.dumps(damaged), "utf-8")
        with pytest.raises(DistlmError) as caught:
            kind.read(path)
        assert str(path) in str(caught.value) and word in str(caught.value), (word, str(caught.value))


def faults(record: Record, tree: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """(damaged file, what the error must say) for every field of a record and of its parts."""
    newer = record.FORMAT + 1
    yield {**tree, "format": newer}, f"format {newer}"
    yield [tree], record.WHAT
    for keys, part in _parts(record, ()):
        yield _damaged(tree, keys, {"stray": 1}), "stray"
        for field in msgspec.structs.fields(part):
            name = field.encode_name
            found = _at(tree, keys)
            if name == "format" or name not in found:
                continue
            wrong: Any = "wrong" if isinstance(found[name], list) else ["wrong"]
            yield _damaged(tree, keys, {name: wrong}), name
            if field.required:
                yield _damaged(tree, keys, {}, name), name


def _parts(value: object, keys: Keys) -> Iterator[tuple[Keys, msgspec.Struct]]:
    """A record and its parts, each kind of part once at every place, with the keys that lead there."""
    if isinstance(value, Record | Part):
        yield keys, value
        for field in msgspec.structs.fields(value):
            yield from _parts(getattr(value, field.name), (*keys, field.encode_name))
    elif isinstance(value, dict):
        for key, inner in list(value.items())[:1]:
            yield from _parts(inner, (*keys, key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for place, inner in enumerate(value[:1]):
            yield from _parts(inner, (*keys, place))


def _at(tree: Any, keys: Keys) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def _damaged(tree: Any, keys: Keys, changes: dict[str, Any], without: str = "") -> Any:
    made = copy.deepcopy(tree)
    found = _at(made, keys)
    found.update(changes)
    found.pop(without, None)
    return made
