"""An example of any record, made from the types of its fields, and the faults that a file of it can have."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UnsetType

from distlm.runtime.records import Record

_PLAIN: dict[Any, Any] = {int: 3, float: 0.5, str: "text", bool: True, Any: 1, object: 1, None: None}


R = TypeVar("R", bound=Record)


def example(kind: type[R]) -> R:
    """A record with a value in every field, those that may be left out, too."""
    return kind(**{field.name: _value(field) for field in msgspec.structs.fields(kind) if field.name != "format"})


def _value(field: msgspec.structs.FieldInfo) -> Any:
    """The default of a text that has one (it says what sort of file this is), else any value of the type."""
    return field.default if isinstance(field.default, str) and field.default else value_of(field.type)


def value_of(kind: Any) -> Any:
    """A value of a type, not null where that can be."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return inner[0]
    if origin in (types.UnionType, typing.Union):
        return value_of(next(each for each in inner if each not in (type(None), UnsetType)))
    if origin is list or origin is tuple:
        return origin(value_of(each) for each in inner if each is not Ellipsis)
    if origin is dict:
        return {value_of(inner[0]): value_of(inner[1])}
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind(**{field.name: value_of(field.type) for field in msgspec.structs.fields(kind)})
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind()
    raise TypeError(f"{kind}: no example known")


def mistyped(kind: type[Record]) -> Iterator[tuple[str, Any]]:
    """Name in the file → a value that its field cannot have."""
    for field in msgspec.structs.fields(kind):
        for value in (["wrong"], {"wrong": "wrong"}, 1.5):
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError:
                yield field.encode_name, value
                break
