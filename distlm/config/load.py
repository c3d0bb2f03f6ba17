"""Recipe or file + overrides → RunConfig. Precedence: default < file < command line, whatever the order."""

import dataclasses
import difflib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import docstring_parser
import jsonargparse
import yaml

from distlm.config.check import check_values
from distlm.config.schema import RunConfig
from distlm.errors import UsageError


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return yaml_names(files("distlm.config") / "recipes")


def yaml_names(folder: Traversable) -> list[str]:
    """Names of the YAML files in a folder of the package, without the suffix, sorted."""
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run's configuration from a recipe name or a YAML file, with `section.key=value` overrides on top.

    Raises UsageError for a missing file, an unknown key (with the nearest name) or a value of the wrong type.
    """
    where, text = _read_recipe(recipe)
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{where}: expected sections and keys, found {type(tree).__name__}")
    from_file = dict(_flatten(tree, where))
    from_command_line = parse_overrides(overrides)
    for key in from_file:
        _check_key(key, where)
    for key in from_command_line:
        _check_key(key, "command line")
    config = _build({**from_file, **from_command_line}, from_file, where)
    if not config.run_dir:
        config.run_dir = f"runs/{config.name}"
    check_values(config, where)
    return config


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`section.key=value` arguments as a mapping; a leading `--` is accepted. The later of two equal keys wins."""
    values = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals or not key:
            raise UsageError(f"argument {argument!r}: expected section.key=value, e.g. train.updates=100")
        values[key] = value
    return values


def config_tree(config: object) -> dict[str, Any]:
    """The configuration as plain dicts, lists and numbers, in the order of the schema."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, defaults included; `load_config` reads it back unchanged."""
    return yaml.safe_dump(config_tree(config), sort_keys=False, allow_unicode=True)


def leaf_fields(cls: type = RunConfig, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Dotted name → dataclass field of every setting."""
    leaves: dict[str, dataclasses.Field[Any]] = {}
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(item.type):
            leaves |= leaf_fields(item.type, f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            leaves[prefix + item.name] = item
    return leaves


def format_help(sections: Sequence[str] = ()) -> str:
    """Help of the settings of some sections (all when none is named), from the field docstrings."""
    lines = []
    for item in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(item.type) and (not sections or item.name in sections):
            lines += _section_help(item.name, item.type)  # type: ignore[arg-type]
    return "\n".join(["Settings (section.key=value):", *_section_help("", RunConfig), *lines])


def _section_help(section: str, cls: type) -> list[str]:
    """A section's title and, per key, its type, default and docstring."""
    described = docstring_parser.parse_from_object(cls)
    texts = {entry.arg_name: " ".join((entry.description or "").split()) for entry in described.params}
    title = " ".join((described.short_description or "").split())
    lines = ["", f"{section or 'run'}: {title}"]
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(item.type):
            continue
        default = getattr(cls(), item.name)
        key = f"{section}.{item.name}" if section else item.name
        lines.append(f"  {key} ({_type_name(item.type)}, default {default!r})")
        lines += textwrap.wrap(texts.get(item.name, ""), 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _type_name(kind: Any) -> str:
    if "Literal" in str(kind):
        return "one of " + ", ".join(str(choice) for choice in kind.__args__)
    return kind.__name__ if isinstance(kind, type) and "[" not in str(kind) else str(kind)


def _read_recipe(recipe: str) -> tuple[str, str]:
    path = Path(recipe)
    if recipe in recipe_names():
        return f"recipe {recipe}", (files("distlm.config") / "recipes" / f"{recipe}.yaml").read_text("utf-8")
    if path.is_file():
        try:
            return str(path), path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 text ({error})") from error
    near = difflib.get_close_matches(recipe, recipe_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"no recipe or file {recipe!r}{hint} Recipes: {', '.join(recipe_names())}")


def _flatten(tree: Mapping[str, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    sections = {item.name for item in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(item.type)}
    for key, value in tree.items():
        if isinstance(value, dict) and prefix == "" and key in sections:
            yield from _flatten(value, where, f"{key}.")
        elif prefix == "" and key in sections:
            raise UsageError(f"{where}: section {key!r} must hold keys, found {value!r}")
        else:
            yield f"{prefix}{key}", value


def _check_key(key: str, where: str) -> None:
    known = leaf_fields()
    if key in known:
        return
    # A bare key (`updates=5`) is nearest to the dotted name that ends in it.
    by_tail = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = by_tail or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"{where}: unknown key {key!r}{hint} (distlm config --help lists all keys)")


@cache
def _parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="distlm VERB RECIPE",
        usage="distlm VERB RECIPE_OR_FILE [section.key=value ...]",
        exit_on_error=False,
        add_help=False,
        default_env=False,
    )
    parser.add_class_arguments(RunConfig, None)
    return parser


def _build(values: Mapping[str, Any], from_file: Mapping[str, Any], where: str) -> RunConfig:
    parser = _parser()
    try:
        namespace = parser.parse_args([f"--{key}={_as_argument(value)}" for key, value in values.items()])
    except (jsonargparse.ArgumentError, ValueError, TypeError):
        _raise_for_the_key(parser, values, from_file, where)
        raise
    return RunConfig(**_plain(parser.instantiate(namespace)))


def _raise_for_the_key(
    parser: jsonargparse.ArgumentParser, values: Mapping[str, Any], from_file: Mapping[str, Any], where: str
) -> None:
    """Parse one key at a time, so that the error names the key and where it was set."""
    for key, value in values.items():
        try:
            parser.parse_args([f"--{key}={_as_argument(value)}"])
        except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
            source = where if key in from_file and from_file[key] is value else "command line"
            raise UsageError(f"{source}: {key}={value!r}: {_reason(key)}") from error


def _plain(namespace: Any) -> dict[str, Any]:
    hints = {item.name: item.type for item in dataclasses.fields(RunConfig)}
    result: dict[str, Any] = {}
    for name, cls in hints.items():
        value = namespace[name]
        if dataclasses.is_dataclass(cls) and not isinstance(value, cls):  # type: ignore[arg-type]
            value = cls(**vars(value))  # type: ignore[operator]
        result[name] = value
    return result


def _as_argument(value: Any) -> str:
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _reason(key: str) -> str:
    return f"expected {_type_name(leaf_fields()[key].type)}"


def split_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """RECIPE_OR_FILE and section.key=value arguments in any order → the recipe and the overrides. UsageError else."""
    overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    recipes = [word for word in words if word not in overrides]
    if len(recipes) != 1:
        given = ", ".join(map(repr, recipes)) or "none"
        raise UsageError(
            f"expected one recipe or file, found {given}; recipes: {', '.join(recipe_names())}; "
            "settings are given as section.key=value"
        )
    return recipes[0], overrides
