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
from distlm.config.schema import RunConfig, sections_of
from distlm.errors import UsageError
from distlm.models.registry import kind, kind_names

_KIND = "model.kind"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return yaml_names(files("distlm.config") / "recipes")


def yaml_names(folder: Traversable) -> list[str]:
    """Names of the YAML files in a folder of the package, without the suffix, sorted."""
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run's configuration from a recipe name or a YAML file, with `section.key=value` overrides on top.

    It has the sections that its kind of model (model.kind) reads. Raises UsageError for a missing file, an unknown key
    (with the nearest name), a key that only other kinds of model read, a value of the wrong type, and values that
    cannot work.
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
    name = str(from_command_line.get(_KIND, from_file.get(_KIND, RunConfig().model.kind)))
    cls = kind(name).config
    # A file that an older version wrote has the sections of all kinds, at their defaults.
    from_file = {key: value for key, value in from_file.items() if not _default_of_another(key, value, cls)}
    for key in from_file:
        _check_key(key, where, cls, name)
    for key in from_command_line:
        _check_key(key, "command line", cls, name)
    config = _build({**from_file, **from_command_line, _KIND: name}, from_file, where, cls)
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


def config_tree(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dicts, lists and numbers, in the order of the schema; sections of its kind alone."""
    tree: dict[str, Any] = dataclasses.asdict(config)
    return {name: value for name, value in tree.items() if name not in config.WITHOUT}


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, defaults included; `load_config` reads it back unchanged."""
    return yaml.safe_dump(config_tree(config), sort_keys=False, allow_unicode=True)


def leaf_fields(cls: type[RunConfig]) -> dict[str, dataclasses.Field[Any]]:
    """Dotted name → dataclass field of every setting of such runs."""
    leaves = {item.name: item for item in dataclasses.fields(cls) if not dataclasses.is_dataclass(item.type)}
    for section, item in sections_of(cls).items():
        leaves |= {f"{section}.{inner.name}": inner for inner in dataclasses.fields(item.type)}  # type: ignore[arg-type]
    return leaves


def run_classes() -> dict[str, type[RunConfig]]:
    """model.kind → the configuration of its runs."""
    return {name: kind(name).config for name in kind_names()}


def format_help(sections: Sequence[str] = (), cls: type[RunConfig] | None = None) -> str:
    """Help of the settings of some sections (all when none is named), from the field docstrings.

    `cls`: of the runs of one kind of model; None: of all, each section that several kinds share once.
    """
    lines: list[str] = []
    for title, owners in _sections_by_class(cls).items():
        (name, described), kinds = title, ", ".join(owners)
        if not sections or name in sections:
            lines += _section_help(name, described, "" if cls or len(owners) == len(kind_names()) else kinds)
    return "\n".join(["Settings (section.key=value):", *_section_help("", RunConfig, ""), *lines])


def _sections_by_class(cls: type[RunConfig] | None) -> dict[tuple[str, type], list[str]]:
    """(section, its class) → kinds of model that have it, in the order of the schema."""
    found: dict[tuple[str, type], list[str]] = {}
    for name, run in run_classes().items() if cls is None else [("", cls)]:
        for section, item in sections_of(run).items():
            found.setdefault((section, item.type), []).append(name)  # type: ignore[arg-type]
    return found


@cache
def _section_help(section: str, cls: type, kinds: str) -> list[str]:
    """A section's title and, per key, its type, default and docstring; `kinds`: those that alone read it."""
    described = docstring_parser.parse_from_object(cls)
    texts = {
        entry.arg_name: " ".join((entry.description or "").split())
        for owner in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)])
        for entry in docstring_parser.parse_from_object(owner).params
    }
    title = " ".join((described.description or "").split())
    only = f" (model.kind={kinds})" if kinds else ""
    lines = ["", *textwrap.wrap(f"{section or 'run'}{only}: {title}", 100, subsequent_indent="  ")]
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
    sections = {section for cls in run_classes().values() for section in sections_of(cls)}
    for key, value in tree.items():
        if isinstance(value, dict) and prefix == "" and key in sections:
            yield from _flatten(value, where, f"{key}.")
        elif prefix == "" and key in sections:
            raise UsageError(f"{where}: section {key!r} must hold keys, found {value!r}")
        else:
            yield f"{prefix}{key}", value


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
def _parser(kind_name: str) -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="distlm VERB RECIPE",
        usage="distlm VERB RECIPE_OR_FILE [section.key=value ...]",
        exit_on_error=False,
        add_help=False,
        default_env=False,
    )
    parser.add_class_arguments(kind(kind_name).config, None)
    return parser


def _build(values: Mapping[str, Any], from_file: Mapping[str, Any], where: str, cls: type[RunConfig]) -> RunConfig:
    parser = _parser(values[_KIND])
    try:
        namespace = parser.parse_args([f"--{key}={_as_argument(value)}" for key, value in values.items()])
    except (jsonargparse.ArgumentError, ValueError, TypeError):
        _raise_for_the_key(parser, values, from_file, where, cls)
        raise
    return cls(**_plain(parser.instantiate(namespace), cls))


def _raise_for_the_key(
    parser: jsonargparse.ArgumentParser,
    values: Mapping[str, Any],
    from_file: Mapping[str, Any],
    where: str,
    cls: type[RunConfig],
) -> None:
    """Parse one key at a time, so that the error names the key and where it was set."""
    # Those of the command line first: each takes a tenth of a second.
    for key, value in sorted(values.items(), key=lambda item: from_file.get(item[0]) is item[1]):
        try:
            parser.parse_args([f"--{key}={_as_argument(value)}"])
        except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
            source = where if key in from_file and from_file[key] is value else "command line"
            raise UsageError(f"{source}: {key}={value!r}: expected {_type_name(leaf_fields(cls)[key].type)}") from error


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
