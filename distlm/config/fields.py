"""How a setting says that it may differ between two starts in the same run directory."""

from dataclasses import Field, field
from typing import Any

VOLATILE = {"volatile": True}
QUESTION = {"question": True}
"""Each value has files of its own in the run directory (runtime/question.py): any number of them side by side."""
LENGTH = {"length": True}
"""How long training goes on: it may grow where the kind of model says that it may (Kind.may_grow)."""


def volatile(default: object) -> object:
    """A field that may differ between two runs of the same run directory: it changes speed, not results."""
    return field(default=default, metadata=VOLATILE)


def question(default: object) -> object:
    """A field that tells questions apart: each of its values has its own files in the run directory."""
    return field(default=default, metadata=QUESTION)


def once(default: object) -> object:
    """A volatile field that holds for one start: a run directory that is named as the recipe does not bring it back."""
    return field(default=default, metadata={**VOLATILE, "once": True})


def holds_once(item: Field[Any]) -> bool:
    """Whether a setting holds for one start only."""
    return bool(item.metadata.get("once"))
