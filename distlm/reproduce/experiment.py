"""What an experiment consists of: commands of distlm over one folder, read from a file of this package.

experiments/NAME.yaml:
  title      a line
  tables     MODULE:FUNCTION that writes the tables of the folder and gives them as text
  inputs     NAME → help; the user gives NAME=FOLDER. `?` at the end of a name: the experiment does without
  lists      variable → help; a scale gives it a list of values, and the user may give another: NAME=[VALUE, …]
  scales     `small` and `paper`: variable → value, among them the recipes; `settings` more settings of every command
  settings   settings of every command but those that are `alone`
  runs       list of
    name       also the folder, below the experiment's; $VARIABLE of `for` or the scale stands for its value
    for        variable → values, or $VARIABLE of `lists`: one command for each combination
    verb       default `run`
    recipe
    into       name of the run in whose folder it works, and whose settings it has before its own
    settings   in which {NAME} is the folder of an input or of a run before this one, which then comes first
A command whose own settings name something that is not there (an input that was not given) is left out.
"""

import itertools
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from distlm.config.load import yaml_names
from distlm.errors import UsageError

_FOLDER = files("distlm.reproduce") / "experiments"
_REFERENCE = re.compile(r"\{([\w.-]+)\}")


@dataclass(frozen=True)
class Item:
    """One command of an experiment."""

    name: str
    verb: str
    recipe: str
    folder: Path
    """Its run directory."""
    settings: tuple[str, ...]
    """Its name and run directory first."""
    after: tuple[str, ...]
    """Names of the items that it needs."""

    @property
    def words(self) -> list[str]:
        """What follows `distlm` on its command line."""
        return [*self.verb.split(), self.recipe, *self.settings]


@dataclass(frozen=True)
class Experiment:
    """An experiment with the user's folders filled in."""

    name: str
    title: str
    root: Path
    tables: str
    items: tuple[Item, ...]


def experiment_names() -> list[str]:
    """Names of the experiments that come with the package, sorted."""
    return yaml_names(_FOLDER)


def load_experiment(
    name: str,
    root: Path,
    inputs: Mapping[str, str],
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    scale: str = "small",
) -> Experiment:
    """The commands of an experiment in `root`, in an order in which each comes after what it needs.

    `inputs`: name → folder, or a list as text.
    `overrides`: settings of every command. `only`: names of items; those and what they need.
    Raises UsageError for an unknown experiment, input, item or scale, and for an input that is missing.
    """
    if name not in experiment_names():
        raise UsageError(f"no experiment {name!r}; there are {', '.join(experiment_names())}")
    tree = _tree(name)
    known = {key.rstrip("?"): text for key, text in tree["inputs"].items()}
    lists = {key: _list(key, text) for key, text in inputs.items() if key in tree.get("lists", {})}
    inputs = {key: folder for key, folder in inputs.items() if key not in lists}
    for given, folder in inputs.items():
        if given not in known:
            raise UsageError(f"{name} has no input {given!r}; it takes {_told(tree)}")
        if not Path(folder).exists():
            raise UsageError(f"{given}={folder}: there is no such folder")
    # An optional one has its ? still and is not asked for.
    if missing := [key for key in tree["inputs"] if not key.endswith("?") and key not in inputs]:
        raise UsageError(f"{name} needs {missing[0]}=FOLDER: {known[missing[0]]}")
    if scale not in tree["scales"]:
        raise UsageError(f"{name} has no scale {scale!r}; there are {', '.join(tree['scales'])}")
    variables = {**tree["scales"][scale], **lists}
    common = [*tree.get("settings", []), *variables.pop("settings", [])]
    places = {key: str(Path(folder).absolute()) for key, folder in inputs.items()}
    items: dict[str, Item] = {}
    for run in tree["runs"]:
        for entry in _each(run, variables):
            item = _item(entry, root, common, items, places)
            if item is not None:
                items[item.name] = item
    if unknown := [wanted for wanted in only if wanted not in items]:
        raise UsageError(f"{name} has no run {unknown[0]!r}; there are {', '.join(items)}")
    chosen = [replace(item, settings=(*item.settings, *overrides)) for item in _with_needs(items, only or list(items))]
    return Experiment(name, tree["title"], root, tree["tables"], tuple(chosen))


def experiment_help() -> str:
    """Every experiment with its inputs, as text."""
    lines = []
    for name in experiment_names():
        tree = _tree(name)
        lines.append(f"{name}: {tree['title']}")
        for key, text in tree["inputs"].items():
            lines.append(f"  {key.rstrip('?')}=FOLDER{' (optional)' if key.endswith('?') else ''}  {text}")
        for key, text in tree.get("lists", {}).items():
            lines.append(f"  {key}={_list_text(tree['scales']['small'][key])} (optional)  {text}")
    return "\n".join(lines)


def _tree(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text("utf-8"))
    return tree


def _told(tree: Mapping[str, Any]) -> str:
    folders = [f"{key.rstrip('?')}=FOLDER ({text})" for key, text in tree["inputs"].items()]
    return ", ".join([*folders, *(f"{key}=[VALUE, …] ({text})" for key, text in tree.get("lists", {}).items())])


def _list(name: str, text: str) -> list[Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise UsageError(f"{name}={text}: expected a list of numbers, e.g. '{name}=[0, 0.5]'")
    return values


def _list_text(values: Sequence[Any]) -> str:
    return f"[{','.join(map(str, values))}]"


def _each(run: Mapping[str, Any], scale: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each combination of the values of `for`, filled in."""
    variables = {key: scale[values[1:]] if isinstance(values, str) else values
                 for key, values in run.get("for", {}).items()}  # fmt: skip
    entries = []
    for values in itertools.product(*variables.values()):
        chosen = {**scale, **dict(zip(variables, values, strict=True))}
        entries.append({key: _filled(value, chosen) for key, value in run.items() if key != "for"})
    return entries


def _filled(value: Any, chosen: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_filled(part, chosen) for part in value]
    return string.Template(value).substitute(chosen) if isinstance(value, str) else value


def _item(
    entry: Mapping[str, Any],
    root: Path,
    common: Sequence[str],
    before: Mapping[str, Item],
    inputs: Mapping[str, str],
) -> Item | None:
    """The command of an entry; None when something that it names is not there."""
    name, into = entry["name"], entry.get("into", entry["name"])
    folders = {**inputs, **{item.name: str(item.folder) for item in before.values()}}

    def needs(settings: Sequence[str]) -> list[str]:
        return [reference for setting in settings for reference in _REFERENCE.findall(setting)]

    own = entry.get("settings", [])
    if any(reference not in folders for reference in needs(own)) or not (into == name or into in before):
        return None
    # What all runs share is left out where it cannot be had.
    shared = [] if entry.get("alone") else [setting for setting in common if folders.keys() >= set(needs([setting]))]
    after = dict.fromkeys(reference for reference in [into, *needs([*shared, *own])] if reference in before)

    def filled(settings: Sequence[str]) -> list[str]:
        return [_REFERENCE.sub(lambda match: folders[match[1]], setting) for setting in settings]

    # A run's folder refuses other settings than those it was trained with.
    first = (f"name={name}", f"run_dir={root / name}", *filled(shared)) if into == name else before[into].settings
    return Item(name, entry.get("verb", "run"), entry["recipe"], root / into, (*first, *filled(own)), tuple(after))


def _with_needs(items: Mapping[str, Item], names: Sequence[str]) -> list[Item]:
    wanted = set(names)
    for item in reversed(list(items.values())):
        if item.name in wanted:
            wanted.update(item.after)
    return [item for item in items.values() if item.name in wanted]
