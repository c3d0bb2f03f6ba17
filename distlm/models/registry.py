"""The kinds of model there are, by name: those of this package, and those that other packages bring.

Another package adds one by an entry point: `[project.entry-points."distlm.kinds"]`, `NAME = "package.module:KIND"`.
A kind is imported when it is asked for.
"""

from functools import cache
from importlib import import_module, metadata

from distlm.errors import UsageError
from distlm.models.kind import Description, Kind, ModelKind

GROUP = "distlm.kinds"
_OWN = {
    "transformer_lm": "distlm.models.transformer.kind:KIND",
    "awd_lstm": "distlm.models.awd_lstm.kind:KIND",
    "hf": "distlm.models.hf.kind:KIND",
    "plm": "distlm.models.plm.kind:KIND",
}
"""model.kind → where it is."""
_OTHERS = {"plm_task": "distlm.finetune.kind:KIND"}
"""Models that a checkpoint can hold and that no recipe trains by model.kind."""


def kind_names() -> tuple[str, ...]:
    """What model.kind can be."""
    return tuple(_OWN) + tuple(sorted(_entry_points()))


def kind(name: str) -> Kind:
    """The kind of runs with model.kind=`name`. Raises UsageError when there is none."""
    found = model_kind(name) if name in kind_names() else None
    if not isinstance(found, Kind):
        raise UsageError(
            f"model.kind={name!r}: no such kind of model; choose one of {', '.join(kind_names())} (a package that "
            f"brings another one has an entry point in the group {GROUP})"
        )
    return found


def not_causal() -> str:
    """Why a masked language model has no datastore."""
    able = [name for name in kind_names() if kind(name).causal]
    return (
        "a masked language model reads both sides of a word: it has no datastore, neighbours or cache; those are for "
        f"model.kind={', '.join(able[:-1])} and {able[-1]}"
    )


def model_names() -> tuple[str, ...]:
    """Kinds of models that a checkpoint can hold."""
    return (*kind_names(), *_OTHERS)


@cache
def model_kind(name: str) -> ModelKind:
    """The kind of model that model.json calls `name`. Raises KeyError when there is none; see `model_names`."""
    place = _OWN.get(name) or _OTHERS.get(name)
    if place is None:
        found: ModelKind = _entry_points()[name].load()
    else:
        module, _, attribute = place.partition(":")
        found = getattr(import_module(module), attribute)
    if found.name != name:
        raise UsageError(f"entry point {name!r} of {GROUP}: its kind calls itself {found.name!r}; name both alike")
    return found


def kind_of(description: Description) -> ModelKind:
    """The kind of a model by its description."""
    return model_kind(description.KIND)


@cache
def _entry_points() -> dict[str, metadata.EntryPoint]:
    """Name → entry point; the names of this package's own kinds cannot be taken."""
    return {entry.name: entry for entry in metadata.entry_points(group=GROUP) if entry.name not in {**_OWN, **_OTHERS}}
