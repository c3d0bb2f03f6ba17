"""Recipe + overrides → RunConfig. Precedence: default < base < recipe < command line, whatever the order."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from distlm.config.bounds import check_bounds, shown
from distlm.config.check import check_values
from distlm.config.fields import holds_once
from distlm.config.recipe import Recipe, is_there, read_recipe, recipe_names
from distlm.config.schema import RunConfig, sections_of
from distlm.config.settings import type_name
from distlm.errors import UsageError
from distlm.models.registry import kind, kind_names

if TYPE_CHECKING:
    # A tenth of a second to import, which `distlm --help` does without.
    import jsonargparse

_KIND = "model.kind"


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run's configuration from a recipe, a YAML file or a run directory, with `section.key=value` overrides on top.

    It has the sections that its kind of model (model.kind) reads. A run directory gives the settings of its latest
    stage, without those that hold for one start only; its run_dir is the folder that was named, wherever it was made.
    Raises UsageError for a missing file, an unknown key (with the nearest name), a key that only other kinds of model
    read, a value of the wrong type, and values that cannot work.
    """
    found = read_recipe(recipe, {section for cls in run_classes().values() for section in sections_of(cls)})
    from_command_line = parse_overrides(overrides)
    name = str(from_command_line.get(_KIND, found.values.get(_KIND, RunConfig().model.kind)))
    cls = kind(name).config
    # A file that an older version wrote has the sections of all kinds, at their defaults.
    from_file = {key: value for key, value in found.values.items() if not _default_of_another(key, value, cls)}
    for key in from_file:
        _check_key(key, found.places.get(key, found.where), cls, name)
    for key in from_command_line:
        _check_key(key, "command line", cls, name)
    if found.run:
        from_file = {key: value for key, value in from_file.items() if not holds_once(leaf_fields(cls)[key])}
        from_file["run_dir"] = str(Path(recipe))
    config = _build({**from_file, **from_command_line, _KIND: name}, from_command_line, found, cls)

    def refuse(key: str, value: object, mend: str) -> NoReturn:
        _refuse(from_command_line, found, key, value, mend)

    check_bounds(config, refuse)
    if not config.run_dir:
        config.run_dir = f"runs/{config.name}"
    kind(name).fill(config)
    check_values(config, refuse)
    return config


def _refuse(from_command_line: Mapping[str, Any], recipe: Recipe, key: str, value: object, mend: str) -> NoReturn:
    source = "command line" if key in from_command_line else recipe.places.get(key, recipe.where)
    raise UsageError(f"{source}: {key}={shown(value)}: {mend}")


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`section.key=value` arguments as a mapping; a leading `--` is accepted. The later of two equal keys wins."""
    values = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals or not key:
            raise UsageError(f"argument {argument!r}: expected section.key=value, e.g. train.updates=100")
        values[key] = value
    return values


def config_tree(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dicts, lists and numbers, in the order of the schema; sections of its kind alone."""
    tree: dict[str, Any] = dataclasses.asdict(config)
    return {name: value for name, value in tree.items() if name not in config.WITHOUT}


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, defaults included; `load_config` reads it back unchanged."""
    return yaml.safe_dump(config_tree(config), sort_keys=False, allow_unicode=True)


def dump_difference(config: RunConfig) -> str:
    """What differs from the defaults of its kind of model, as YAML; as a recipe it is the same configuration."""
    found: dict[str, Any] = {}
    defaults = config_tree(type(config)())
    # A reader finds the kind by its name, and the folder by the run's.
    defaults["model"]["kind"], defaults["run_dir"] = RunConfig().model.kind, f"runs/{config.name}"
    for name, value in config_tree(config).items():
        if isinstance(value, dict):
            found[name] = {key: inner for key, inner in value.items() if inner != defaults[name][key]}
        elif value != defaults[name]:
            found[name] = value
    found = {name: value for name, value in found.items() if value != {}}
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True) if found else ""


def leaf_fields(cls: type[RunConfig]) -> dict[str, dataclasses.Field[Any]]:
    """Dotted name → dataclass field of every setting of such runs."""
    leaves = {item.name: item for item in dataclasses.fields(cls) if not dataclasses.is_dataclass(item.type)}
    for section, item in sections_of(cls).items():
        leaves |= {f"{section}.{inner.name}": inner for inner in dataclasses.fields(item.type)}  # type: ignore[arg-type]
    return leaves


def run_classes() -> dict[str, type[RunConfig]]:
    """model.kind → the configuration of its runs."""
    return {name: kind(name).config for name in kind_names()}


def _default_of_another(key: str, value: Any, cls: type[RunConfig]) -> bool:
    """A setting that only other kinds of model read, with their default: it asks for nothing."""
    if key in leaf_fields(cls):
        return False
    section, _, name = key.partition(".")
    others = [run for run in run_classes().values() if key in leaf_fields(run)]
    return bool(others) and any(getattr(getattr(run(), section), name) == value for run in others)


def _check_key(key: str, where: str, cls: type[RunConfig], kind_name: str) -> None:
    known = leaf_fields(cls)
    if key in known:
        return
    readers = [name for name, run in run_classes().items() if key in leaf_fields(run)]
    if readers:
        raise UsageError(
            f"{where}: {key} is not read by model.kind={kind_name}, only by {', '.join(readers)}; leave it out, or set "
            "another model.kind"
        )
    # A bare key (`updates=5`) is nearest to the dotted name that ends in it.
    by_tail = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = by_tail or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"{where}: unknown key {key!r}{hint} (distlm config --help lists all keys)")


@cache
def _parser(kind_name: str) -> "jsonargparse.ArgumentParser":
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="distlm VERB RECIPE",
        usage="distlm VERB RECIPE [section.key=value ...]",
        exit_on_error=False,
        add_help=False,
        default_env=False,
    )
    parser.add_class_arguments(kind(kind_name).config, None)
    return parser


def _build(
    values: Mapping[str, Any], from_command_line: Mapping[str, Any], recipe: Recipe, cls: type[RunConfig]
) -> RunConfig:
    import jsonargparse

    parser = _parser(values[_KIND])
    try:
        namespace = parser.parse_args([f"--{key}={_as_argument(value)}" for key, value in values.items()])
    except (jsonargparse.ArgumentError, ValueError, TypeError):
        _raise_for_the_key(parser, values, from_command_line, recipe, cls)
        raise
    return cls(**_plain(parser.instantiate(namespace), cls))


def _raise_for_the_key(
    parser: "jsonargparse.ArgumentParser",
    values: Mapping[str, Any],
    from_command_line: Mapping[str, Any],
    recipe: Recipe,
    cls: type[RunConfig],
) -> None:
    """Parse one key at a time, so that the error names the key and where it was set."""
    import jsonargparse

    # Those of the command line first: each takes a tenth of a second.
    for key, value in sorted(values.items(), key=lambda item: item[0] not in from_command_line):
        try:
            parser.parse_args([f"--{key}={_as_argument(value)}"])
        except (jsonargparse.ArgumentError, ValueError, TypeError):
            _refuse(from_command_line, recipe, key, value, f"expected {type_name(leaf_fields(cls)[key].type)}")


def _plain(namespace: Any, cls: type[RunConfig]) -> dict[str, Any]:
    hints = {item.name: item.type for item in dataclasses.fields(cls)}
    result: dict[str, Any] = {}
    for name, kind_of_value in hints.items():
        value = namespace[name]
        if dataclasses.is_dataclass(kind_of_value) and not isinstance(value, kind_of_value):  # type: ignore[arg-type]
            value = kind_of_value(**vars(value))  # type: ignore[operator]
        result[name] = value
    return result


def _as_argument(value: Any) -> str:
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def split_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """RECIPE and section.key=value arguments in any order → the recipe and the overrides. Raises UsageError."""
    overrides = [word for word in words if "=" in word and not is_there(word)]
    recipes = [word for word in words if word not in overrides]
    if len(recipes) != 1:
        given = ", ".join(map(repr, recipes)) or "none"
        raise UsageError(
            f"expected one recipe, file or run directory, found {given}; recipes: {', '.join(recipe_names())}; "
            "settings are given as section.key=value"
        )
    return recipes[0], overrides
