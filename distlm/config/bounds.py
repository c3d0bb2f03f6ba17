"""What holds for every setting: it has a value, numbers are of a size that computers handle, strings are valid text.

Further bounds of single settings are in check.py and with the kinds of model.
"""

import math
import unicodedata
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from distlm.config.schema import RunConfig, sections_of
from distlm.models.kind import Refuse

_LARGEST_INT = 2**53
"""Up to here sizes and counts are the same as 64-bit integers and as floats."""
_LARGEST_FLOAT, _LEAST_FLOAT = 3.4e38, 1.2e-38
"""Of single precision: what is beyond is infinite there, what is below is 0."""
_LARGEST_SEED = 2**31 - 1
"""faiss takes an int32."""
_SEEDS = ("seed", "seeds")
_LONGEST_TEXT = 4096
"""Of a path on Linux."""
_LONGEST_SHOWN = 200
_OF_A_TOKENIZER = ("data.line_end", "hf.begin")
"""Pieces, which may be a line feed."""


def check_bounds(config: RunConfig, refuse: Refuse) -> None:
    """Calls `refuse` with the first setting that is null, not finite, beyond what numbers hold, or no text."""
    for key, value in _leaves(config):
        for one in value if isinstance(value, list) else [value]:
            if problem := _problem(key, one):
                refuse(key, value, problem)


def _leaves(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every setting."""
    for item in fields(config):
        value = getattr(config, item.name)
        if not is_dataclass(value):
            yield item.name, value
        elif item.name in sections_of(type(config)):
            yield from ((f"{item.name}.{inner.name}", getattr(value, inner.name)) for inner in fields(value))


def _problem(key: str, value: object) -> str:
    """What is wrong with a setting, or with one entry of its list; empty: nothing."""
    if value is None:
        return "is null; give a value, or leave it out for the default"
    if isinstance(value, str):
        return _problem_of_text(key, value)
    if isinstance(value, float):
        return _problem_of_float(value)
    if isinstance(value, int) and key.rpartition(".")[2] in _SEEDS:
        return "" if 0 <= value <= _LARGEST_SEED else f"a seed is from 0 to {_LARGEST_SEED}"
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        return f"must be at most {_LARGEST_INT}"
    return ""


def _problem_of_float(value: float) -> str:
    if not math.isfinite(value):
        return "must be a finite number"
    if abs(value) > _LARGEST_FLOAT:
        return f"must be at most {_LARGEST_FLOAT:g}: it is infinite in single precision"
    if 0 < abs(value) < _LEAST_FLOAT:
        return f"is 0 in single precision; set 0, or at least {_LEAST_FLOAT:g}"
    return ""


def _problem_of_text(key: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "is not UTF-8, so that it cannot be recorded; use another name"
    if "\0" in value or (key not in _OF_A_TOKENIZER and any(unicodedata.category(c) == "Cc" for c in value)):
        return "has a control character in it (a line feed, a tab, NUL, …); use another name"
    if len(value) > _LONGEST_TEXT:
        return f"has {len(value)} characters, at most {_LONGEST_TEXT} will do"
    return ""


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
