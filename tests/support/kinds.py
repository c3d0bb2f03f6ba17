"""Settings of several kinds of model over one list: each takes those that its kind reads, over a recipe of its kind."""

from collections.abc import Sequence

from distlm.config.load import leaf_fields
from distlm.models.registry import kind

RECIPES = {"transformer_lm": "demo", "awd_lstm": "awd-lstm-small", "hf": "hf", "plm": "plm-base"}
"""model.kind → a recipe of that kind."""


def kind_in(overrides: Sequence[str]) -> str:
    """The model.kind that a list of overrides asks for."""
    named = [word.partition("=")[2] for word in overrides if word.startswith("model.kind=")]
    return named[-1] if named else "transformer_lm"


def recipe_of(overrides: Sequence[str]) -> str:
    """The recipe that a list of overrides goes on top of."""
    return RECIPES[kind_in(overrides)]


def readable(overrides: Sequence[str]) -> list[str]:
    """Those overrides that the kind of model among them reads. One that could carry its state does not, where blocks
    have context."""
    known = leaf_fields(kind(kind_in(overrides)).config)
    words = [word for word in overrides if word.partition("=")[0] in known]
    set_ = {word.partition("=")[0] for word in words}
    blocks = kind(kind_in(overrides)).carries and "knn.context_window" in set_ and "knn.carry" not in set_
    return [*words, "knn.carry=false"] if blocks else words
