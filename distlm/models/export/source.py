"""A self-contained module out of definitions of this package: what they use is copied along, imports of distlm are not.

The copies are the text of our own modules, comments included, so that there is one source of truth. Nothing is
imported here: modules are read.
"""

import ast
import builtins
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_PACKAGE = "distlm"


class Place(NamedTuple):
    """A definition: `distlm.memory.retrieval:half_scores`."""

    module: str
    name: str

    @classmethod
    def of(cls, text: str) -> "Place":
        """From MODULE:NAME."""
        module, _, name = text.partition(":")
        return cls(module, name)


@dataclass
class _Module:
    """A module that was read."""

    text: str
    defined: dict[str, ast.stmt]
    """Name → the statement that defines it."""
    notes: dict[str, ast.stmt]
    """Name of a constant → the string below it, which describes it."""
    imports: dict[str, Place]
    """Name → where it is from; the name of a whole module is empty."""


@dataclass
class Collector:
    """Copies definitions, each after those that it uses.

    `replaced`: MODULE:NAME of this package → what stands for it in the copy: MODULE:NAME of another definition, or a
    name that is known there. `left_out`: MODULE:CLASS → its methods that are not copied.
    """

    replaced: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    _copied: dict[Place, str] = field(default_factory=dict)
    _under_way: set[Place] = field(default_factory=set)
    _imports: set[Place] = field(default_factory=set)

    def add(self, roots: Iterable[str]) -> "Collector":
        """Copy these, MODULE:NAME each.

        Raises ValueError for a name that is not there, for two definitions of one name, and for a use of this package
        that cannot be copied.
        """
        for root in roots:
            self._copy(Place.of(root))
        return self

    def external(self, module: str, name: str) -> None:
        """Import a name of another package, for text that is added to the copy."""
        self._imports.add(Place(module, name))

    def source(self, header: str, tail: str = "") -> str:
        """The module: `header` as its description, imports, the copies, and `tail`."""
        parts = [*self._copied.values(), *([tail.strip()] if tail else [])]
        # As ruff formats it.
        gap = "\n" * (3 if parts[0].startswith(("def ", "class ", "@")) else 2)
        return f'"""{header}"""\n\n{self._import_lines()}{gap}' + "\n\n\n".join(parts) + "\n"

    def _copy(self, place: Place) -> None:
        if place in self._copied or place in self._under_way:
            return
        module = _read(place.module)
        if place.name not in module.defined:
            raise ValueError(f"{place.module} does not define {place.name}")
        if clash := next((other for other in self._copied if other.name == place.name), None):
            raise ValueError(f"{place.name} is in {clash.module} and in {place.module}: rename one of them")
        self._under_way.add(place)
        statement = module.defined[place.name]
        left_out = self.left_out.get(f"{place.module}:{place.name}", ())
        # In descriptions, too, where the statement itself does not use them.
        names = {Place.of(key).name: other.rpartition(":")[2] for key, other in self.replaced.items()}
        for name in sorted(_names(statement, left_out)):
            if (found := self._resolve(module, place, name)) is not None:
                names[name] = found
        text = _text(module, place.name, left_out)
        for name, other in names.items():
            if name != other:
                text = re.sub(rf"(?<![\w.]){re.escape(name)}\b", other, text)
        self._copied[place] = text
        self._under_way.discard(place)

    def _resolve(self, module: _Module, user: Place, name: str) -> str | None:
        """Copy or import what a definition calls `name`; what the copy calls it, None for a local or built-in name."""
        if name in module.defined:
            place = Place(user.module, name)
        elif name in module.imports:
            place = module.imports[name]
        else:
            return None
        if place.module.partition(".")[0] != _PACKAGE:
            self._imports.add(place)
            return name
        place = _defining(place)
        other = self.replaced.get(f"{place.module}:{place.name}")
        if other is None:
            if name != place.name:
                raise ValueError(f"{user.module}: {place.name} is imported under another name, {name}")
            self._copy(place)
            return name
        if ":" not in other:
            if not hasattr(builtins, other.partition(".")[0]):
                self._known(other)
            return other
        self._copy(Place.of(other))
        return Place.of(other).name

    def _known(self, name: str) -> None:
        """nn.Module and the like: the import that they need."""
        if name.startswith("nn."):
            self._imports.add(Place("torch", "nn"))

    def _import_lines(self) -> str:
        """As ruff sorts them."""
        groups: dict[bool, list[str]] = {True: [], False: []}
        by_module: dict[str, set[str]] = {}
        for module, name in self._imports:
            by_module.setdefault(module, set()).add(name)
        for module in sorted(by_module, key=lambda found: (found.lower(), found)):
            names = by_module[module]
            standard = module.partition(".")[0] in sys.stdlib_module_names
            alias = {name for name in names if name.startswith("=")}
            groups[standard] += [_whole(module, name) for name in sorted(alias)]
        for module in sorted(by_module):
            given = sorted((n for n in by_module[module] if not n.startswith("=")), key=_isort_key)
            if given:
                groups[module.partition(".")[0] in sys.stdlib_module_names].append(_wrapped(module, given))
        return "\n\n".join("\n".join(group) for group in groups.values() if group)


def _whole(module: str, alias: str) -> str:
    """`import MODULE` or `import MODULE as ALIAS`."""
    name = alias.removeprefix("=")
    return f"import {module}" + (f" as {name}" if name != module.partition(".")[0] else "")


def _wrapped(module: str, names: Sequence[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    return line if len(line) <= 120 else f"from {module} import (\n    " + ",\n    ".join(names) + ",\n)"


def _isort_key(name: str) -> tuple[int, str]:
    """Constants, classes, then others."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2, name)


@cache
def _read(module: str) -> _Module:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"{module}: no such module")
    text = Path(spec.origin).read_text("utf-8")
    found = _Module(text, {}, {}, {})
    before = ""
    for statement in ast.parse(text).body:
        names = _defines(statement)
        found.defined |= dict.fromkeys(names, statement)
        if isinstance(statement, ast.ImportFrom) and statement.module:
            found.imports |= {alias.asname or alias.name: Place(statement.module, alias.name)
                              for alias in statement.names}  # fmt: skip
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                name = alias.asname or alias.name.partition(".")[0]
                found.imports[name] = Place(alias.name if alias.asname else name, f"={name}")
        elif before and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            found.notes[before] = statement
        before = names[0] if names and not isinstance(statement, ast.ClassDef | ast.FunctionDef) else ""
    return found


def _defines(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else (
        [statement.target] if isinstance(statement, ast.AnnAssign) else []
    )  # fmt: skip
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _defining(place: Place) -> Place:
    """Where a name of this package is defined: not where a package hands it on."""
    module = _read(place.module)
    if place.name in module.defined:
        return place
    if place.name not in module.imports:
        raise ValueError(f"{place.module} has no {place.name}")
    return _defining(module.imports[place.name])


def _kept(statement: ast.stmt, left_out: Sequence[str]) -> list[ast.AST]:
    if not left_out or not isinstance(statement, ast.ClassDef):
        return [statement]
    missing = set(left_out) - {item.name for item in statement.body if isinstance(item, ast.FunctionDef)}
    if missing:
        raise ValueError(f"{statement.name} has no method {min(missing)} to leave out")
    body: list[ast.AST] = [*statement.bases, *statement.decorator_list]
    return body + [i for i in statement.body if not (isinstance(i, ast.FunctionDef) and i.name in left_out)]


def _names(statement: ast.stmt, left_out: Sequence[str]) -> set[str]:
    """Names that it uses."""
    found: set[str] = set()
    for part in _kept(statement, left_out):
        for node in ast.walk(part):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == _PACKAGE:
                raise ValueError(f"line {node.lineno}: {node.module} is imported within a definition that is copied")
    return found - set(_defines(statement))


def _text(module: _Module, name: str, left_out: Sequence[str]) -> str:
    """The source of the statement, with the docstring behind a constant."""
    statement, lines = module.defined[name], module.text.splitlines()
    first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
    # A comment right above belongs to it.
    while first > 1 and lines[first - 2].startswith("#"):
        first -= 1
    last = (module.notes.get(name) or statement).end_lineno or first
    wanted = dict(enumerate(lines, 1))
    if isinstance(statement, ast.ClassDef):
        for item in statement.body:
            if isinstance(item, ast.FunctionDef) and item.name in left_out:
                start = min([item.lineno, *(d.lineno for d in item.decorator_list)])
                for number in range(start, (item.end_lineno or start) + 1):
                    del wanted[number]
                if not lines[start - 2].strip():
                    wanted.pop(start - 1)
    # What follows on its line says how it is formatted.
    return "\n".join(wanted[number] for number in range(first, last + 1) if number in wanted)
