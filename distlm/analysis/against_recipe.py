"""The settings of a run against those of a shipped recipe: which differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distlm.config.load import config_tree, dump_config, load_config, run_classes
from distlm.config.recipe import read_recipe, recipe_names
from distlm.config.schema import RunConfig, sections_of
from distlm.config.yaml_files import yaml_of

_OWN = ("name", "run_dir")
"""Settings that every run has of its own."""
_KIND = "model.kind"


@dataclass(frozen=True)
class Change:
    """A setting with another value than in the recipe."""

    setting: str
    """Dotted name."""
    run: str
    """Its value in the run, as YAML."""
    recipe: str
    """Its value in the recipe, as YAML."""


@dataclass(frozen=True)
class AgainstRecipe:
    """A run's settings that differ from a recipe."""

    recipe: str
    """Name of a shipped recipe, or empty: the defaults of the kind of model."""
    changes: list[Change]


def against_recipe(name: str, settings: Mapping[str, Any]) -> AgainstRecipe:
    """Recorded `settings` of the run `name` against the shipped recipe of its kind of model that they differ least
    from: a run does not record what it was started from. Of equally near ones that of the run's name goes first, then
    the first by name. A setting that the run does not have is newer than it and is left out. Where no recipe is of that
    kind, or this version does not know the kind, against what is known of the defaults."""
    kind = str(settings.get("model", {}).get("kind", RunConfig().model.kind))
    cls = run_classes().get(kind, RunConfig)
    distances = {recipe: _distance(settings, own, cls) for recipe, own in _recipes_of(kind).items()}
    if not distances:
        return AgainstRecipe("", _changes(settings, cls()))
    nearest = min(distances, key=lambda recipe: (distances[recipe], recipe != name, recipe))
    return AgainstRecipe(nearest, _changes(settings, load_config(nearest)))


def _recipes_of(kind: str) -> dict[str, dict[str, Any]]:
    """Shipped recipe of this kind of model → dotted name → value."""
    sections = {section for cls in run_classes().values() for section in sections_of(cls)}
    values = {recipe: read_recipe(recipe, sections).values for recipe in recipe_names()}
    return {recipe: own for recipe, own in values.items() if own.get(_KIND, RunConfig().model.kind) == kind}


def _distance(settings: Mapping[str, Any], values: Mapping[str, Any], cls: type[RunConfig]) -> int:
    """Settings that differ, by the words of the recipe: to load each recipe would take seconds."""
    wanted = {**_leaves(config_tree(cls())), **values}
    return sum(key in wanted and value != wanted[key] for key, value in _leaves(settings).items())


def _changes(settings: Mapping[str, Any], config: RunConfig) -> list[Change]:
    """In the order in which the run recorded them."""
    wanted = _leaves(yaml_of(dump_config(config)))
    return [
        Change(key, _text(value), _text(wanted[key]))
        for key, value in _leaves(settings).items()
        if key not in _OWN and key in wanted and value != wanted[key]
    ]


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name → value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= {f"{name}.{inner}": own for inner, own in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _text(value: Any) -> str:
    """In one line; an empty text is shown as such."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) or "(empty)"
