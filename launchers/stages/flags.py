"""Flags of sbatch and srun that a plan sets itself, and the keys of the site file that do: for further ones (`extra`,
`srun`) that would replace them, or be replaced, without a word."""

import re
from collections.abc import Iterable

from distlm.errors import UsageError

_GPUS = "gpus_per_node and gpu_type"
_NODES = "nodes and tasks_per_node"
_NOBODY = ""
SBATCH = {
    "account": "account", "array": "array", "chdir": _NOBODY, "constraint": "constraint",
    "cpus-per-gpu": "cpus_per_task", "cpus-per-task": "cpus_per_task", "dependency": "after",
    "gpus": _GPUS, "gpus-per-node": _GPUS, "gpus-per-task": _GPUS, "gres": _GPUS, "job-name": _NOBODY,
    "kill-on-invalid-dep": _NOBODY, "mem": "mem", "nodes": _NODES,
    "no-requeue": _NOBODY, "ntasks": _NODES, "ntasks-per-node": _NODES, "open-mode": _NOBODY, "output": _NOBODY,
    "partition": "partition", "qos": "qos", "requeue": _NOBODY, "reservation": "reservation",
    "signal": "signal_lead_s", "time": "time",
}  # fmt: skip
"""sbatch option → key; empty: the plan's alone."""
SRUN = {
    "cpus-per-task": "cpus_per_task", "kill-on-bad-exit": _NOBODY, "mpi": "mpi", "nodes": _NODES, "ntasks": _NODES,
    "ntasks-per-node": _NODES, "open-mode": _NOBODY, "output": _NOBODY, "unbuffered": _NOBODY, "wait": _NOBODY,
}  # fmt: skip
"""The same of srun."""
_CONDITION = re.compile(r"(after|afterany|afterburstbuffer|aftercorr|afternotok|afterok)(:\d+(_\d+|\+\d+)?)+|singleton")


def check_flags(where: str, flags: Iterable[str], own: dict[str, str], blanks: bool = False) -> None:
    """Raise UsageError for a flag that is not `--name` or `--name=value`, or is one of the plan's `own`.

    `where`: file and key, for the message. `blanks`: values may have some.
    """
    for flag in flags:
        name, _, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not name or (not blanks and any(letter.isspace() for letter in flag)):
            without = "" if blanks else " without blanks"
            raise UsageError(f"{where}: {flag!r}: expected --name or --name=value{without}")
        # Slurm's commands also take the beginning of a name.
        meant = [name] if name in own else [each for each in own if each.startswith(name) and len(name) > 2]
        # Other generic resources (a node's scratch) are nobody else's.
        if meant and (meant[0] != "gres" or value.startswith("gpu")):
            key = own[meant[0]]
            mend = f"use {key} in the site file" if key else "remove it: the plan of the job rests on its own"
            raise UsageError(f"{where}: {flag!r}: the plan sets --{meant[0]} itself; {mend}")


def check_conditions(where: str, conditions: Iterable[str]) -> None:
    """Raise UsageError for a dependency that sbatch would not take."""
    for condition in conditions:
        if not _CONDITION.fullmatch(condition):
            raise UsageError(f"{where}: {condition!r}: expected a condition of sbatch --dependency, as afterok:123")
