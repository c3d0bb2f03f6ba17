"""Values that a setting should not have, or just may: by its type, as words of a command line."""

import dataclasses
import typing
from typing import Any, Literal

from hypothesis import strategies as st

_INTEGERS = ["0", "-1", "1", "2", "3", "7", "1000", "2147483647", "2147483648", str(2**53), str(2**63 - 1), str(2**63)]
_FLOATS = [
    "0", "-1", "1", "0.5", "0.999999999", "1e-8", "1e-37", "-0.0", "2", "100", "1e30", "3e38", "1e308", "1e-320", "inf",
    "-inf", "nan", ".nan",
]  # fmt: skip
_TEXTS = [
    "", " ", "null", "x", "x" * 300, "x" * 5000, "é漢\U0001f600", "a\nb", "a\0b", "\udcff", "../x", "/dev/null",
    "/proc/self/mem", "/nowhere/a", "~", "*", "-x", "a b", "true", "1", "valid", "train", "last_output", "zero3",
    "none", "a=b", "/", "%s", "{x}", "$HOME", "IVF1,Flat", "IVF0,Flat", "IVF4294967296,Flat", "Flat", "PQ64", "HNSW32",
    "OPQ4,IVF4,PQ4", "IVF16,PQ3", "IVF4,SQ8", "IDMap,Flat",
]  # fmt: skip
_ODD = [
    "", " ", "null", "~", "[]", "[[]]", "[[1]]", "{}", "{a: 1}", "[null]", "yes", "0x10", "1_000", "1e3", "&a b", "*a",
    "'", "- a", "!!python/object:os.system x", "[a", "@x", "--help", "1,2", "x" * 5000, "2026-01-01", "1:30",
]  # fmt: skip
"""For settings of any type: most are of none."""


def words_for(item: dataclasses.Field[Any]) -> st.SearchStrategy[str]:
    """What is typed behind `KEY=`: mostly extremes of its own type, else anything."""
    return st.one_of(_of_type(item.type), _of_type(item.type), _of_type(item.type), st.sampled_from(_ODD))


def _of_type(kind: Any) -> st.SearchStrategy[str]:
    if kind is bool:
        return st.sampled_from(["true", "false"])
    if kind is int:
        return st.sampled_from(_INTEGERS)
    if kind is float:
        return st.sampled_from(_FLOATS)
    if typing.get_origin(kind) is Literal:
        return st.sampled_from([str(choice) for choice in typing.get_args(kind)])
    if typing.get_origin(kind) is list:
        inner = st.lists(_of_type(typing.get_args(kind)[0]), max_size=3)
        return inner.map(lambda values: f"[{','.join(values)}]")
    return st.sampled_from(_TEXTS)
