"""What an experiment consists of: commands of distlm over one folder, read from a file of this package.

experiments/NAME.yaml:
  title      a line
  paper      module that writes the tables of the folder (distlm/analysis/papers/)
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
import shlex
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import msgspec
import yaml

from distlm.config.fields import holds_once
from distlm.config.load import leaf_fields, run_classes
from distlm.config.recipe import yaml_names
from distlm.config.yaml_files import yaml_of
from distlm.errors import UsageError
from distlm.runtime.records import Part

_FOLDER = files("distlm.reproduce") / "experiments"
_REFERENCE = re.compile(r"\{([\w.-]+)\}")


Number = int | float
Value = str | Number | list[str | Number]
"""Of a variable."""


class _Run(Part, kw_only=True):
    """An entry of `runs`."""

    name: str
    recipe: str
    loops: dict[str, str | list[str | Number]] = msgspec.field(name="for", default_factory=dict)
    verb: str = "run"
    into: str = ""
    """Empty: its own folder."""
    alone: bool = False
    settings: list[str] = msgspec.field(default_factory=list)


class _Description(Part, kw_only=True):
    """experiments/NAME.yaml."""

    title: str
    paper: str
    inputs: dict[str, str]
    lists: dict[str, str] = msgspec.field(default_factory=dict)
    scales: dict[str, dict[str, Value]]
    settings: list[str] = msgspec.field(default_factory=list)
    runs: list[_Run]


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
    paper: str
    """Module of its tables."""
    items: tuple[Item, ...]
    command: str
    """What a user types for all of it, with /path/to/ in place of the folders before the last, without what holds
    for one start alone."""


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
    plan = _description(name)
    known = {key.rstrip("?"): text for key, text in plan.inputs.items()}
    lists = {key: _list(key, text) for key, text in inputs.items() if key in plan.lists}
    inputs = {key: folder for key, folder in inputs.items() if key not in lists}
    for given, folder in inputs.items():
        if given not in known:
            raise UsageError(f"{name} has no input {given!r}; it takes {_told(plan)}")
        if not Path(folder).exists():
            raise UsageError(f"{given}={folder}: there is no such folder")
    # An optional one has its ? still and is not asked for.
    if missing := [key for key in plan.inputs if not key.endswith("?") and key not in inputs]:
        raise UsageError(f"{name} needs {missing[0]}=FOLDER: {known[missing[0]]}")
    if scale not in plan.scales:
        raise UsageError(f"{name} has no scale {scale!r}; there are {', '.join(plan.scales)}")
    variables: dict[str, Value] = {**plan.scales[scale], **lists}
    more = variables.pop("settings", [])
    common = [*plan.settings, *map(str, more if isinstance(more, list) else [more])]
    places = {key: str(Path(folder).absolute()) for key, folder in inputs.items()}
    items: dict[str, Item] = {}
    for run in plan.runs:
        for entry in _each(run, variables):
            item = _item(entry, root, common, items, places)
            if item is not None:
                items[item.name] = item
    if unknown := [wanted for wanted in only if wanted not in items]:
        raise UsageError(f"{name} has no run {unknown[0]!r}; there are {', '.join(items)}")
    chosen = [replace(item, settings=(*item.settings, *overrides)) for item in _with_needs(items, only or list(items))]
    words = [f"{key}=/path/to/{Path(inputs[key]).absolute().name}" for key in known if key in inputs]
    words += [f"{key}=[{','.join(map(str, lists[key]))}]" for key in plan.lists if key in lists]
    lasting = [word for word in overrides if not _is_once(word)]
    words += [*map(_portable, lasting), *(["--scale", scale] if scale != "small" else [])]
    command = shlex.join(["distlm", "reproduce", name, *words])
    return Experiment(name, plan.title, root, plan.paper, tuple(chosen), command)


def _is_once(word: str) -> bool:
    """Whether a setting holds for one start alone, and so decides nothing that is left behind."""
    fields = (leaf_fields(cls).get(word.partition("=")[0]) for cls in run_classes().values())
    return any(item is not None and holds_once(item) for item in fields)


def _portable(word: str) -> str:
    """Of an absolute path the last part: the others are of one machine."""
    return re.sub(r"(?<![^=\[,])/(?:[^,\]]*/)?([^/,\]]+)/*", r"/path/to/\1", word)


def experiment_help() -> str:
    """Every experiment with its inputs, as text."""
    lines = []
    for name in experiment_names():
        plan = _description(name)
        lines.append(f"{name}: {plan.title}")
        for key, text in plan.inputs.items():
            lines.append(f"  {key.rstrip('?')}=FOLDER{' (optional)' if key.endswith('?') else ''}  {text}")
        for key, text in plan.lists.items():
            values = plan.scales["small"][key]
            assert isinstance(values, list)
            lines.append(f"  {key}=[{','.join(map(str, values))}] (optional)  {text}")
    return "\n".join(lines)


def _description(name: str) -> _Description:
    return msgspec.convert(yaml.safe_load((_FOLDER / f"{name}.yaml").read_text("utf-8")), _Description)


def _told(plan: _Description) -> str:
    folders = [f"{key.rstrip('?')}=FOLDER ({text})" for key, text in plan.inputs.items()]
    return ", ".join([*folders, *(f"{key}=[VALUE, …] ({text})" for key, text in plan.lists.items())])


def _list(name: str, text: str) -> list[str | Number]:
    try:
        values = yaml_of(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise UsageError(f"{name}={text}: expected a list of numbers, e.g. '{name}=[0, 0.5]'")
    return values


def _each(run: _Run, scale: Mapping[str, Value]) -> list[_Run]:
    """One entry for each combination of the values of `for`, filled in."""
    loops = [scale[values[1:]] if isinstance(values, str) else values for values in run.loops.values()]
    entries = []
    for values in itertools.product(*(loop if isinstance(loop, list) else [loop] for loop in loops)):
        chosen = {**scale, **dict(zip(run.loops, values, strict=True))}
        name, recipe, verb, into, *settings = (
            string.Template(text).substitute(chosen)
            for text in (run.name, run.recipe, run.verb, run.into, *run.settings)
        )
        entries.append(_Run(name=name, recipe=recipe, verb=verb, into=into, alone=run.alone, settings=settings))
    return entries


def _item(
    entry: _Run,
    root: Path,
    common: Sequence[str],
    before: Mapping[str, Item],
    inputs: Mapping[str, str],
) -> Item | None:
    """The command of an entry; None when something that it names is not there."""
    name, into = entry.name, entry.into or entry.name
    folders = {**inputs, **{item.name: str(item.folder) for item in before.values()}}

    def needs(settings: Sequence[str]) -> list[str]:
        return [reference for setting in settings for reference in _REFERENCE.findall(setting)]

    own = entry.settings
    if any(reference not in folders for reference in needs(own)) or not (into == name or into in before):
        return None
    # A shared setting is left out where the folder that it names is not made.
    shared = [] if entry.alone else [setting for setting in common if folders.keys() >= set(needs([setting]))]
    after = dict.fromkeys(reference for reference in [into, *needs([*shared, *own])] if reference in before)

    def filled(settings: Sequence[str]) -> list[str]:
        return [_REFERENCE.sub(lambda match: folders[match[1]], setting) for setting in settings]

    # A run's folder refuses other settings than those it was trained with.
    first = (f"name={name}", f"run_dir={root / name}", *filled(shared)) if into == name else before[into].settings
    return Item(name, entry.verb, entry.recipe, root / into, (*first, *filled(own)), tuple(after))


def _with_needs(items: Mapping[str, Item], names: Sequence[str]) -> list[Item]:
    wanted = set(names)
    for item in reversed(list(items.values())):
        if item.name in wanted:
            wanted.update(item.after)
    return [item for item in items.values() if item.name in wanted]
