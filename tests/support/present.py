"""What its type allows to be absent, and is there in the case that a test has made."""

from typing import TypeVar

from msgspec import UnsetType

T = TypeVar("T")


def present(value: T | UnsetType | None) -> T:
    """The value itself."""
    assert value is not None and not isinstance(value, UnsetType)
    return value
