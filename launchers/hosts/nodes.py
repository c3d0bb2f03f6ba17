"""Node lists and hostfiles: which hosts, how many ranks on each.

A hostfile has one `HOST slots=N` a line; `#` begins a comment. Slurm's compressed lists are read without Slurm, because
a front may have to name the nodes where no scontrol is.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distlm.errors import DistlmError, UsageError
from distlm.runtime.files import atomic_path
from distlm.runtime.ranks.nodelist import expand_nodes, split_list

_LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\S+)")
# What a launcher passes through a shell and a comma-separated list unharmed.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")


@dataclass(frozen=True, slots=True)
class Host:
    """One node and the number of ranks on it."""

    name: str
    slots: int


def expand_counts(text: str) -> list[int]:
    """Slurm's counts per node: `2(x3),1` → 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise DistlmError(f"counts per node {text!r}: bad entry {part!r}; expected e.g. 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def read_hostfile(path: Path) -> list[Host]:
    """Hosts of a hostfile, in its order.

    Raises UsageError naming file and line: missing file, bad line, slots that are no number above 0, a host twice.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError as error:
        raise UsageError(
            f"{path}: no such hostfile; write `HOST slots=RANKS` lines into it, or give --hosts a:4,b:4"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: hostfile cannot be read: {error}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None:
            raise UsageError(f"{path}:{number}: {text!r} is no host; write it as `HOST slots=RANKS`")
        entries.append((f"{path}:{number}", found[1], found[2]))
    return _hosts(entries, str(path))


def parse_hosts(text: str) -> list[Host]:
    """Hosts of an argument `a:4,b[1-2]:4`. Raises UsageError as read_hostfile does."""
    entries = []
    try:
        for item in split_list(text, text):
            names, _, slots = item.rpartition(":")
            if not names:
                raise UsageError(f"--hosts: {item!r} has no slots; write HOST:RANKS, e.g. {item}:4")
            entries += [(f"--hosts {item}", name, slots) for name in expand_nodes(names)]
    except DistlmError as error:
        raise error if isinstance(error, UsageError) else UsageError(f"--hosts: {error}") from error
    return _hosts(entries, "--hosts")


def _hosts(entries: Sequence[tuple[str, str, str]], source: str) -> list[Host]:
    first: dict[str, str] = {}
    hosts = []
    for where, name, slots in entries:
        if not _NAME.fullmatch(name):
            raise UsageError(f"{where}: {name!r} is no host name; use letters, digits, '.', '_' and '-'")
        if not slots.isdigit() or int(slots) < 1:
            raise UsageError(f"{where}: slots={slots} of {name}: must be a number of ranks, 1 or more")
        if name in first:
            raise UsageError(f"{where}: {name} was there already ({first[name]}); keep one line with all its slots")
        first[name] = where
        hosts.append(Host(name, int(slots)))
    if not hosts:
        raise UsageError(f"{source}: no hosts in it; write `HOST slots=RANKS`, one a line")
    return hosts


def slurm_hosts(env: Mapping[str, str], ranks: int, slots_per_node: int = 0) -> list[Host]:
    """Hosts of the Slurm job that `env` describes, so that there are `ranks` slots.

    A job's shape says ranks per node in its tasks or, where one task is a launcher, in its GPUs: taken is the one that
    gives `ranks`, or `slots_per_node` where that is given. Raises UsageError outside a job, and where none fits.
    """
    nodes = env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if not nodes:
        raise UsageError(
            "no hosts given and this is no Slurm job (SLURM_JOB_NODELIST is not set); give --hostfile FILE, "
            "--hosts a:4,b:4, or start it from sbatch or salloc"
        )
    names = expand_nodes(nodes)
    if slots_per_node:
        return [Host(name, slots_per_node) for name in names]
    shapes: dict[str, list[int]] = {}
    for variable in ("SLURM_TASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE"):
        if variable in env:
            shapes[variable] = expand_counts(env[variable])
    for variable in ("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        # `--gpus-per-node=v100:4` is exported as it was typed.
        if (count := env.get(variable, "").rpartition(":")[2]).isdigit():
            shapes[variable] = [int(count)] * len(names)
    for counts in shapes.values():
        if len(counts) == len(names) and sum(counts) == ranks:
            return [Host(name, count) for name, count in zip(names, counts, strict=True)]
    known = ", ".join(f"{variable}={env[variable]}" for variable in shapes) or "no tasks or GPUs per node"
    each = f"{ranks // len(names)}" if ranks % len(names) == 0 else "N"
    raise UsageError(
        f"--ranks {ranks} does not fit this Slurm job: {nodes} ({len(names)} nodes) with {known}; "
        f"submit it with --ntasks-per-node={each}, or give --slots-per-node {each}"
    )


def write_hostfile(path: Path, hosts: Sequence[Host]) -> None:
    """`HOST slots=N` lines, in order; whole or absent."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts), "utf-8")


def require_ranks(hosts: Sequence[Host], ranks: int, source: str) -> None:
    """UsageError when the slots are not exactly the ranks asked for."""
    total = sum(host.slots for host in hosts)
    if total != ranks:
        shown = ", ".join(f"{host.name} slots={host.slots}" for host in hosts[:8]) + (", ..." if len(hosts) > 8 else "")
        raise UsageError(
            f"world mismatch: --ranks {ranks} asked, but {source} gives {total} ({shown}); "
            f"change its slots, or ask for --ranks {total}"
        )


def require_equal(hosts: Sequence[Host], source: str, launcher: str) -> None:
    """UsageError where a launcher needs the same number of ranks on every host and does not get it."""
    for host in hosts:
        if host.slots != hosts[0].slots:
            raise UsageError(
                f"{source}: {hosts[0].name} has slots={hosts[0].slots} and {host.name} slots={host.slots}; "
                f"--via {launcher} needs equal slots on all hosts: make them equal, or use --via pdsh"
            )
