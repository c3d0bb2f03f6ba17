"""A record's file as nobody wrote it: an entry gone, of another type, there twice; cut, or with something behind."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from distlm.runtime.records import CHECK, checksum
from support.records import Keys

VALUES: list[Any] = [
    None, "", "x", " ", "a/b", "../x", "\ud800", [], [[]], {}, {"x": 1}, -1, 0, 1, 2, 10**6, 2**31, 2**63 - 1, 10**30,
    1.5, -0.5, 1e300, float("nan"), float("inf"), True, False, ["x"], [1, 2], "0" * 32,
]  # fmt: skip


def places(tree: Any, keys: Keys = ()) -> Iterator[Keys]:
    """The way to every entry of a tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*keys, key)
        yield from places(value, (*keys, key))


@st.composite
def edited(draw: st.DrawFn, written: bytes) -> bytes:
    """One entry of a file removed or with another value; with the checksum of what it now is, or that of before."""
    tree = json.loads(written)
    *way, last = draw(st.sampled_from([keys for keys in places(tree) if keys != (CHECK,)]))
    found = tree
    for key in way:
        found = found[key]
    if draw(st.integers(0, 4)) == 0:
        found.pop(last)
    else:
        found[last] = draw(st.sampled_from(VALUES))
    return as_json(sealed(tree) if draw(st.booleans()) else tree)


def sealed(tree: Any) -> Any:
    """A tree with the checksum of its own content."""
    rest = {name: value for name, value in tree.items() if name != CHECK}
    try:
        return {**rest, CHECK: checksum(rest)}
    except (TypeError, ValueError):
        return tree


def as_json(tree: Any) -> bytes:
    """As a file has it."""
    return json.dumps(tree, indent=1).encode()


def _doubled(written: bytes) -> bytes:
    tree = json.loads(written)
    name = next(iter(tree))
    return f'{{"{name}": {json.dumps(tree[name])}, '.encode() + written.lstrip()[1:]


HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "reordered": lambda written: as_json(dict(reversed(json.loads(written).items()))),
    "reordered below": lambda written: as_json(_turned(json.loads(written))),
    "on one line": lambda written: json.dumps(json.loads(written)).encode(),
    "with blanks around": lambda written: b"\n \t" + written + b"\r\n\n",
    "escaped": lambda written: as_json(json.loads(written)),
}
"""The same record, in other bytes."""
HARMFUL: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda written: b"",
    "cut": lambda written: written[: len(written) // 2],
    "cut within a letter": lambda written: written[:-4] + "é".encode()[:1],
    "a byte order mark": lambda written: b"\xef\xbb\xbf" + written,
    "UTF-16": lambda written: written.decode().encode("utf-16"),
    "something behind": lambda written: written + b"{}",
    "NUL behind": lambda written: written + b"\0" * 4096,
    "no UTF-8": lambda written: written.replace(b'"', b'"\xff', 1),
    "zeros": lambda written: b"\0" * len(written),
    "nested": lambda written: b"[" * 200_000 + b"]" * 200_000,
    "nested below": lambda written: b'{"format": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "a number of many digits": lambda written: b'{"format": ' + b"9" * 5000 + b"}",
    "an entry twice": _doubled,
    "a number": lambda written: b"7",
    "null": lambda written: b"null",
    "a list": lambda written: b"[" + written + b"]",
    "a text": lambda written: b'"x"',
    "an empty object": lambda written: b"{}",
    "binary": lambda written: bytes(range(256)) * 8,
}
"""No such record any more."""


def _turned(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _turned(value) for key, value in reversed(tree.items())}
    return [_turned(value) for value in tree] if isinstance(tree, list) else copy.deepcopy(tree)
