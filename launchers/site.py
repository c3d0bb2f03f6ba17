"""The site file: what this cluster's jobs look like, once for the sbatch scripts and for `distlm submit`.

python -m launchers.site init            write site.yaml, to be edited
python -m launchers.site show            every setting, and where it comes from
python -m launchers.site flags train     sbatch flags of a stage: sbatch $(python -m launchers.site flags train) ...
python -m launchers.site scripts         the folder of the sbatch scripts
python -m launchers.site setup           shell lines to run before Python, to eval

The file is --site FILE, else $DISTLM_SITE, else ./site.yaml, else ~/.config/distlm/site.yaml; without one the defaults
below hold: nodes of four V100.
"""

import argparse
import dataclasses
import difflib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from distlm.config.yaml_files import yaml_of
from distlm.errors import DistlmError, UsageError
from launchers.site_example import init_site, scripts
from launchers.stages.flags import SBATCH, SRUN, check_conditions, check_flags

STAGES = (
    "prepare",
    "shard",
    "train",
    "datastore",
    "index-train",
    "index-add",
    "index-merge",
    "search",
    "evaluate",
    "finetune",
)
"""Stages of a recipe, in order; keys of `stages` in the site file."""
SERIAL = ("prepare", "evaluate")
"""Stages of one rank, which need no GPU."""
ONE_NODE = (*SERIAL, "index-merge")
"""Stages that --nodes and --ranks do not spread: those of one rank, and merging, for which one node fills the disk."""
_NO_GPU = (*ONE_NODE, "shard")
_MAY_BE_0 = ("gpus_per_node", "tasks_per_node", "array", "again")
_PLACE = ("partition", "account", "qos", "constraint", "reservation")
_FILES = (Path("site.yaml"), Path("~/.config/distlm/site.yaml"))


@dataclass(frozen=True)
class StageSettings:
    """Settings of one stage; what is not given is the site's."""

    nodes: int | None = None
    """Nodes (1 where nothing is given)."""
    tasks_per_node: int | None = None
    """Ranks on a node."""
    cpus_per_task: int | None = None
    """CPUs of a rank."""
    gpus_per_node: int | None = None
    """GPUs of a node."""
    gpu_type: str | None = None
    """Their type."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features."""
    reservation: str | None = None
    """Reservation."""
    time: int | None = None
    """Time limit of one start, in minutes."""
    mem: str | None = None
    """Memory of a node, as sbatch --mem takes it."""
    array: int | None = None
    """Do this stage as an array of so many independent jobs instead of MPI ranks (datastore, index-add)."""
    extra: list[str] | None = None
    """Further sbatch flags, after the site's."""


@dataclass(frozen=True)
class Site:
    """The cluster. Every field is optional."""

    partition: str = ""
    """Partition (sbatch --partition)."""
    account: str = ""
    """Account to charge."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Node features, e.g. v100."""
    reservation: str = ""
    """Reservation."""
    mpi: str = "pmix"
    """srun --mpi: what `srun --mpi=list` names and the MPI library was built for; none: gloo only."""
    gpus_per_node: int = 4
    """GPUs of a node (0: CPU only)."""
    gpu_type: str = ""
    """Their type where nodes have several, e.g. v100 (sbatch --gpus-per-node=v100:4)."""
    tasks_per_node: int = 0
    """Ranks on a node (0: one per GPU, or one where there is no GPU)."""
    cpus_per_task: int = 10
    """CPUs of a rank."""
    mem: str = ""
    """Memory of a node, e.g. 240G; empty: the partition's default; "0": all of it."""
    time: int = 1440
    """Time limit of one start, in minutes; a stage that needs longer is requeued and continues."""
    signal_lead_s: int = 120
    """Seconds before the time limit at which Slurm signals the ranks; must exceed one step and one save."""
    max_same_start: int = 3
    """A job whose last so many restarts brought no progress is not requeued again."""
    again: int = 0
    """How often a job may come back that Slurm cancels for another one (PreemptMode=CANCEL)."""
    after: list[str] = field(default_factory=list)
    """submit: what the first job also waits for, as sbatch --dependency takes it: [afterok:123]."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run before Python: module load, source venv/bin/activate."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables to export."""
    stage_in: str = ""
    """launch.stage_in of runs that name none, e.g. /local/scratch or $TMPDIR, whose variables are read on each node."""
    python: str = ""
    """What starts the ranks instead of the interpreter of `setup`: a wrapper or command that ends in a python."""
    srun: list[str] = field(default_factory=list)
    """Further srun arguments, each as --name or --name=value."""
    extra: list[str] = field(default_factory=list)
    """Further sbatch flags, each as --name or --name=value."""
    stages: dict[str, StageSettings] = field(default_factory=dict)
    """Settings of single stages."""

    def resources(self, stage: str) -> "Resources":
        """What a stage asks for. Raises UsageError for an unknown stage."""
        own = self.stages.get(check_stage(stage), StageSettings())
        serial = stage in SERIAL
        gpus = _first(own.gpus_per_node, 0 if stage in _NO_GPU else self.gpus_per_node)
        # A stage that names its GPUs and not its tasks wants one task per GPU, whatever the site's count is.
        site_tasks = 0 if own.gpus_per_node is not None else self.tasks_per_node
        # Shards and merging want CPUs: as many tasks as there are where GPUs are used.
        default = self.gpus_per_node if stage in _NO_GPU else gpus
        tasks = 1 if serial else _first(own.tasks_per_node, site_tasks) or max(1, default)
        return Resources(
            nodes=1 if serial else _first(own.nodes, 1),
            tasks_per_node=tasks,
            cpus_per_task=_first(own.cpus_per_task, self.cpus_per_task),
            gpus_per_node=gpus,
            gpu_type=_first(own.gpu_type, self.gpu_type),
            time=_first(own.time, self.time),
            mem=_first(own.mem, self.mem),
            array=own.array or 0,
            extra=(*self.extra, *(own.extra or ())),
        )

    def account_flags(self, stage: str) -> dict[str, str]:
        """Where the jobs of a stage go: sbatch options."""
        own = self.stages.get(stage, StageSettings())
        named = {name: _first(getattr(own, name), getattr(self, name)) for name in _PLACE}
        return {name: value for name, value in named.items() if value}

    def python_words(self) -> list[str]:
        """The words of `python`; none: the interpreter itself. Raises ValueError for a quote that is not closed."""
        return shlex.split(self.python)

    def setup_lines(self) -> list[str]:
        """Shell lines to run before Python."""
        # The stages themselves replace its variables.
        place = [f"export DISTLM_STAGE_IN={shlex.quote(self.stage_in)}"] if self.stage_in else []
        return [*self.setup, *place, *(f"export {name}={shlex.quote(value)}" for name, value in self.env.items())]


@dataclass(frozen=True)
class Resources:
    """What one job of a stage asks of Slurm."""

    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int
    gpu_type: str
    time: int
    """Minutes."""
    mem: str
    array: int
    """Elements of an array of shares (0: ranks of one job)."""
    extra: tuple[str, ...]

    @property
    def gpus(self) -> str:
        """The value of sbatch --gpus-per-node."""
        return (
            f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type and self.gpus_per_node else f"{self.gpus_per_node}"
        )


def load_site(file: str | None = None) -> tuple[Site, str]:
    """The site's settings and the name of the file they come from ("built-in defaults" without one).

    Raises UsageError for a named file that is missing, an unknown key (with the nearest name) or a wrong value.
    """
    path = _find(file)
    if path is None:
        return Site(), "built-in defaults"
    try:
        tree = yaml_of(path.read_text("utf-8"), as_text=True) or {}
    except ValueError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from error
    return parse_site(tree, str(path)), str(path)


def parse_site(tree: Any, where: str) -> Site:
    """Settings from the tree of a site file (scalars as text)."""
    values = _fields(Site, tree, where, "")
    stages = {name: tree["stages"][name] for name in values.get("stages", {})}
    for name in stages:
        check_stage(name, f"{where}: stages")
    values["stages"] = {
        name: StageSettings(**_fields(StageSettings, settings, where, f"stages.{name}."))
        for name, settings in stages.items()
    }
    site = Site(**values)
    extras = {"extra": site.extra, **{f"stages.{name}.extra": own.extra or [] for name, own in site.stages.items()}}
    for key, flags in extras.items():
        check_flags(f"{where}: {key}", flags, SBATCH)
    check_flags(f"{where}: srun", site.srun, SRUN, blanks=True)
    check_conditions(f"{where}: after", site.after)
    try:
        site.python_words()
    except ValueError as error:
        raise UsageError(f"{where}: python={site.python!r}: {error}") from error
    return site


def check_stage(stage: str, where: str = "stage") -> str:
    """`stage`, if there is such a one; UsageError with the nearest name otherwise."""
    if stage not in STAGES:
        raise UsageError(f"{where}: unknown stage {stage!r}{_nearest(stage, STAGES)} Stages: {', '.join(STAGES)}")
    return stage


def sbatch_flags(site: Site, stage: str) -> list[str]:
    """The flags of a stage's sbatch script. An array's size is the script's own business."""
    wanted = site.resources(stage)
    flags = [f"--{name}={value}" for name, value in site.account_flags(stage).items()]
    flags += [
        f"--nodes={wanted.nodes}", f"--ntasks-per-node={wanted.tasks_per_node}",
        f"--cpus-per-task={wanted.cpus_per_task}", f"--gpus-per-node={wanted.gpus}",
        f"--time={wanted.time}", f"--signal=USR1@{site.signal_lead_s}",
    ]  # fmt: skip
    if wanted.mem:
        flags.append(f"--mem={wanted.mem}")
    flags += wanted.extra
    for flag in flags:
        # The shell splits $(…) at blanks and knows no quotes in it.
        if any(letter.isspace() for letter in flag):
            raise UsageError(f"site: {flag!r}: blanks cannot be passed on to sbatch")
    return flags


def show(site: Site, source: str) -> str:
    """Every setting as YAML, and the shape of each stage."""
    tree = dataclasses.asdict(site)
    tree["stages"] = {
        name: {key: value for key, value in settings.items() if value is not None}
        for name, settings in tree["stages"].items()
    }
    lines = [f"# from {source}", yaml.safe_dump(tree, sort_keys=False).rstrip(), "", "# resolved stages"]
    for stage in STAGES:
        wanted = site.resources(stage)
        array = f", as an array of {wanted.array}" if wanted.array else ""
        lines.append(
            f"# {stage:<12} {wanted.nodes} node(s) x {wanted.tasks_per_node} rank(s), {wanted.cpus_per_task} CPUs per "
            f"rank, {wanted.gpus} GPUs per node, {wanted.time} min{array}"
        )
    return "\n".join(lines)


def _find(file: str | None) -> Path | None:
    named = file or os.environ.get("DISTLM_SITE")
    if named:
        path = _existing(Path(named))
        if path is None:
            raise UsageError(f"site file {named}: no such file ({'--site' if file else '$DISTLM_SITE'})")
        return path
    return next(filter(None, map(_existing, _FILES)), None)


def _existing(path: Path) -> Path | None:
    """The file with ~ resolved; None where there is none, or no home (containers), or one that others may not enter."""
    try:
        path = path.expanduser()
        return path if path.is_file() else None
    except (RuntimeError, OSError):
        return None


def _fields(cls: type, tree: Any, where: str, prefix: str) -> dict[str, Any]:
    """Values of a mapping, converted to the types of the dataclass's fields."""
    if not isinstance(tree, Mapping):
        raise UsageError(f"{where}: {prefix.rstrip('.') or 'site file'}: expected keys, found {tree!r}")
    kinds = get_type_hints(cls)
    for key in tree:
        if key not in kinds:
            near = _nearest(str(key), list(kinds))
            raise UsageError(f"{where}: unknown key {prefix + str(key)!r}{near} Keys: {', '.join(kinds)}")
    return {key: _value(value, kinds[key], f"{where}: {prefix}{key}") for key, value in tree.items()}


def _value(value: Any, kind: Any, where: str) -> Any:
    if kind in (int, int | None):
        if not (isinstance(value, str) and value.isdecimal()):
            unit = " of minutes" if where.endswith("time") else ""
            unit = "; the type goes into gpu_type" if where.endswith("gpus_per_node") and ":" in value else unit
            raise UsageError(f"{where}={value!r}: expected a whole number{unit}")
        if int(value) == 0 and not where.endswith(_MAY_BE_0):
            raise UsageError(f"{where}=0: expected 1 or more")
        return int(value)
    texts = list(value.values()) if isinstance(value, dict) else value
    if kind in (str, str | None):
        expected, fits = "text", isinstance(value, str)
    elif kind in (list[str], list[str] | None):
        expected, fits = "a list of texts", isinstance(value, list) and all(isinstance(text, str) for text in texts)
    elif kind == dict[str, str]:
        expected, fits = (
            "NAME: value lines",
            isinstance(value, dict) and all(isinstance(text, str) for text in texts),
        )
    else:
        expected, fits = "stages and their settings", isinstance(value, dict)
    if not fits:
        raise UsageError(f"{where}={value!r}: expected {expected}")
    return value


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def _first(own: Any, other: Any) -> Any:
    return other if own is None else own


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exits 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m launchers.site", description="The cluster's settings.")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        sys.exit(tell(options))
    except DistlmError as error:
        print(f"launchers.site: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `site` takes."""
    parser.add_argument("--site", metavar="FILE", help="site file (default: $DISTLM_SITE, ./site.yaml, ~/.config/…)")
    actions = parser.add_subparsers(dest="action", required=True)
    new = actions.add_parser("init", help="write a site file, to be edited; one that is there stays")
    new.add_argument("file", metavar="FILE", nargs="?", default="site.yaml", help="default: %(default)s")
    actions.add_parser("show", help="every setting, and where it comes from")
    actions.add_parser("flags", help="sbatch flags of a stage").add_argument("stage", metavar="STAGE")
    actions.add_parser("scripts", help="the folder of the sbatch scripts")
    actions.add_parser("setup", help="shell lines to run before Python")


def tell(options: argparse.Namespace) -> int:
    """Print what is asked for; 0. Raises UsageError."""
    if options.action == "init":
        print(f"{init_site(Path(options.file))}: set partition, account, GPUs per node; `distlm site show`")
        return 0
    if options.action == "scripts":
        print(scripts())
        return 0
    site, source = load_site(options.site)
    if options.action == "show":
        print(show(site, source))
    elif options.action == "flags":
        print(" ".join(sbatch_flags(site, options.stage)))
    else:
        # srun reads SLURM_MPI_TYPE as its --mpi. The arrays are bash's.
        arrays = [f"SRUN=({shlex.join(site.srun)})", f"PYTHON=({shlex.join(site.python_words() or ['python'])})"]
        print("\n".join([*site.setup_lines(), f"export SLURM_MPI_TYPE={shlex.quote(site.mpi)}", *arrays]))
    return 0


if __name__ == "__main__":
    main()
