"""What a RECIPE argument names: a recipe of the package, a YAML file, or a run directory; and what it starts from.

A recipe may say `base: NAME_OR_FILE` and then only what differs; the base may have a base.
"""

import difflib
import errno
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from distlm.config.yaml_files import yaml_of
from distlm.errors import UsageError

BASE = "base"
RUN_CONFIG = "config.yaml"
"""In a run directory: the resolved configuration of its latest stage."""
_OWN = ("name", "run_dir")
"""Settings that a recipe does not take from its base: two recipes must not share a run directory."""


@dataclass(frozen=True)
class Recipe:
    """The settings that a recipe and its bases give."""

    where: str
    """The recipe as errors call it."""
    values: dict[str, Any]
    """Dotted name → value as YAML gives it."""
    places: dict[str, str]
    """Dotted name → the recipe or file that sets it, as errors call it."""
    run: bool = False
    """It is a run directory."""


@dataclass(frozen=True)
class _Source:
    where: str
    name: str
    """Of the runs of a recipe that has a base and no name."""
    text: str
    folder: Path | None
    """Where its base may lie; None: a recipe of the package."""
    run: bool = False


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return yaml_names(_shipped())


def yaml_names(folder: Traversable) -> list[str]:
    """Names of the YAML files in a folder of the package, without the suffix, sorted."""
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_summaries() -> dict[str, str]:
    """Recipe of the package → the first line of its comment."""
    texts = {name: (_shipped() / f"{name}.yaml").read_text("utf-8") for name in recipe_names()}
    return {name: text.partition("\n")[0].removeprefix("#").strip() for name, text in texts.items()}


def is_run_dir(word: str) -> bool:
    """Whether a RECIPE argument names a folder; a recipe of the package goes before a folder of its name."""
    return word not in recipe_names() and Path(word).is_dir()


def is_recipe(word: str) -> bool:
    """Whether a RECIPE argument names something that is there."""
    return word in recipe_names() or is_there(word)


def is_there(word: str) -> bool:
    """Whether a word is a path of something; one that is no possible path, as a long list of values, is none."""
    try:
        return Path(word).exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def read_recipe(recipe: str, sections: Set[str]) -> Recipe:
    """The settings of a recipe, over those of its bases. A run directory gives its latest settings and is run_dir.

    `sections`: names of the sections that a recipe can have. Raises UsageError, naming the recipe or file, for what is
    not there, is no YAML of sections and keys, or has itself among its bases.
    """
    return _read(_find(recipe), sections, [])


def _read(source: _Source, sections: Set[str], above: list[str]) -> Recipe:
    where = source.where
    if where in above:
        raise UsageError(f"{where}: its base leads back to it ({' → '.join([*above, where])}); let one have no base")
    try:
        tree = yaml_of(source.text) or {}
    except ValueError as error:
        raise UsageError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{where}: expected sections and keys, found {type(tree).__name__}")
    base, values, places = tree.pop(BASE, None), dict[str, Any](), dict[str, str]()
    if base is not None:
        found = _read(_find_base(base, source), sections, [*above, where])
        values = {key: value for key, value in found.values.items() if key not in _OWN} | {"name": source.name}
        places = found.places
    own = dict(_flatten(tree, where, sections))
    return Recipe(where, values | own, places | dict.fromkeys(own, where), source.run)


def _find(recipe: str) -> _Source:
    if recipe in recipe_names():
        return _of_package(recipe)
    path = Path(recipe)
    if path.is_dir():
        return _of_run(path)
    if path.is_file():
        return _of_file(path)
    raise _unknown(f"no recipe, file or run directory {recipe!r}", recipe)


def _find_base(base: object, source: _Source) -> _Source:
    if not isinstance(base, str):
        raise UsageError(f"{source.where}: {BASE}={base!r}: expected the name of a recipe, or a file")
    if base in recipe_names():
        return _of_package(base)
    if source.folder is not None:
        path = source.folder / base
        if path.is_file():
            return _of_file(path)
    beside = f" in {source.folder}" if source.folder is not None else ""
    raise _unknown(f"{source.where}: {BASE}={base!r}: there is no such recipe, and no such file{beside}", base)


def _unknown(what: str, name: str) -> UsageError:
    near = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return UsageError(f"{what}{hint} Recipes: {', '.join(recipe_names())}")


def _of_package(name: str) -> _Source:
    return _Source(f"recipe {name}", name, (_shipped() / f"{name}.yaml").read_text("utf-8"), None)


def _of_file(path: Path) -> _Source:
    try:
        text = path.read_text("utf-8")
        if not text.strip():
            raise UsageError(f"{path}: an empty file, not a recipe. Recipes: {', '.join(recipe_names())}")
        return _Source(str(path), path.stem, text, path.parent)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error})") from error


def _of_run(folder: Path) -> _Source:
    path = folder / RUN_CONFIG
    if not path.is_file():
        raise UsageError(
            f"{folder}: a folder without {RUN_CONFIG}, so it is no run directory: a run has that file from its first "
            f"stage on. Name a recipe, with run_dir={folder} for a run in this folder"
        )
    return _Source(str(path), folder.name, path.read_text("utf-8"), folder, run=True)


def _shipped() -> Traversable:
    return files("distlm.config") / "recipes"


def _flatten(tree: Mapping[str, Any], where: str, sections: Set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and prefix == "" and key in sections:
            yield from _flatten(value, where, sections, f"{key}.")
        elif prefix == "" and key in sections:
            raise UsageError(f"{where}: section {key!r} must hold keys, found {value!r}")
        else:
            yield f"{prefix}{key}", value
