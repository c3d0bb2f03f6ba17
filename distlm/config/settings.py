"""What settings there are, section by section: for the help of the command line and the configuration page."""

import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from distlm.config.schema import RunConfig, sections_of
from distlm.models.registry import kind, kind_names


@dataclass(frozen=True)
class Setting:
    """One setting as it is explained to people."""

    key: str
    """`section.name`."""
    type: str
    default: object
    text: str


@dataclass(frozen=True)
class Section:
    """A section of the configuration."""

    name: str
    """Empty: the settings of a run that are in no section."""
    text: str
    kinds: tuple[str, ...]
    """Kinds of model that alone read it; empty: all do."""
    settings: tuple[Setting, ...]


def all_sections(cls: type[RunConfig] | None = None) -> list[Section]:
    """Every section in the order of the schema, the run's own settings first.

    `cls`: of the runs of one kind of model; None: of all, each section that several kinds share once.
    """
    found = [_section("", RunConfig, ())]
    for (name, described), owners in _sections_by_class(cls).items():
        found.append(_section(name, described, () if cls or len(owners) == len(kind_names()) else tuple(owners)))
    return found


def format_help(sections: Sequence[str] = (), cls: type[RunConfig] | None = None) -> str:
    """Help of the settings of some sections (all when none is named), from the field docstrings; `cls` as above."""
    lines = ["Settings (section.key=value):"]
    for section in all_sections(cls):
        if section.name and sections and section.name not in sections:
            continue
        only = f" (model.kind={', '.join(section.kinds)})" if section.kinds else ""
        title = f"{section.name or 'run'}{only}: {section.text}"
        lines += ["", *textwrap.wrap(title, 100, subsequent_indent="  ")]
        for setting in section.settings:
            lines.append(f"  {setting.key} ({setting.type}, default {setting.default!r})")
            lines += textwrap.wrap(setting.text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def type_name(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) or "''" for choice in get_args(kind))
    if get_origin(kind) is list and get_origin(get_args(kind)[0]) is Literal:
        return "some of " + ", ".join(get_args(get_args(kind)[0]))
    return kind.__name__ if isinstance(kind, type) and "[" not in str(kind) else str(kind)


def _sections_by_class(cls: type[RunConfig] | None) -> dict[tuple[str, type], list[str]]:
    """(section, its class) → kinds of model that have it, in the order of the schema."""
    runs = {name: kind(name).config for name in kind_names()} if cls is None else {"": cls}
    found: dict[tuple[str, type], list[str]] = {}
    for name, run in runs.items():
        for section, item in sections_of(run).items():
            found.setdefault((section, item.type), []).append(name)  # type: ignore[arg-type]
    return found


@cache
def _section(name: str, cls: type, kinds: tuple[str, ...]) -> Section:
    import docstring_parser

    described = docstring_parser.parse_from_object(cls)
    texts = {
        entry.arg_name: " ".join((entry.description or "").split())
        for owner in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)])
        for entry in docstring_parser.parse_from_object(owner).params
    }
    settings = tuple(
        Setting(
            key=f"{name}.{item.name}" if name else item.name, type=type_name(item.type),
            default=getattr(cls(), item.name), text=texts.get(item.name, ""),
        )
        for item in dataclasses.fields(cls) if not dataclasses.is_dataclass(item.type)
    )  # fmt: skip
    return Section(name, " ".join((described.description or "").split()), kinds, settings)
