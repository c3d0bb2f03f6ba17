"""What is asked of Slurm: squeue, sacct, scontrol, scancel, with parseable formats, timeouts and clear errors."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from distlm.errors import DistlmError

TIMEOUT_S = 30.0
"""A busy or dead controller lets its clients wait for minutes."""
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
          "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT")  # fmt: skip
"""States of a job that can still run. Others are final."""
_HAS_ENDED = ("Invalid job id", "already completing or completed")
"""What scancel says of a job that Slurm has forgotten, and of one that it still knows."""
UNKNOWN = "UNKNOWN"
"""State of a job that neither squeue nor sacct knows: ended long ago, or another cluster's."""


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array, as Slurm shows it now."""

    id: str
    """`12`, or `12_3` for task 3 of array 12."""
    state: str
    """PENDING, RUNNING, COMPLETED, ..., or UNKNOWN."""
    elapsed: str = ""
    """Run time of this start, [days-]hours:minutes:seconds as Slurm writes it."""
    left: str = ""
    """Time until its limit, as Slurm writes it; empty when it does not run."""
    nodes: str = ""
    """Compressed node list; empty before it runs."""
    reason: str = ""
    """Why it waits or ended, in Slurm's word; empty when there is nothing to say."""

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE


def installed() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def command(tool: str, *arguments: str, timeout: float = TIMEOUT_S) -> str:
    """Standard output of a Slurm command.

    Raises DistlmError when there is no Slurm, when it does not answer in `timeout` seconds, or when it refuses.
    """
    done = _run(tool, arguments, timeout)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise DistlmError(f"{tool} {' '.join(arguments)}: {said[-1]}")
    return done.stdout


def jobs(ids: Sequence[str]) -> dict[str, list[Job]]:
    """Id → the job, or the tasks of an array (an id `12` of an array gives all its tasks).

    squeue first: it needs no accounting. What it has forgotten is asked of sacct, where accounting works. A job that
    neither knows is one UNKNOWN entry. Without Slurm all are UNKNOWN.
    """
    if not ids:
        return {}
    if not installed():
        return {each: [Job(each, UNKNOWN)] for each in ids}
    shown = {each: _matching(each, found) for found in [_squeue(ids)] for each in ids}
    missing = [each for each in ids if not shown[each]]
    if missing:
        found = _sacct(missing)
        for each in missing:
            shown[each] = _matching(each, found) or [Job(each, UNKNOWN)]
    return shown


def _squeue(ids: Sequence[str]) -> list[Job]:
    # squeue refuses a single id that it has forgotten, but passes over unknown ones among several.
    arguments = ["--noheader", "--states=all", "--array", f"--jobs={','.join(_parents(ids))}"]
    done = _run("squeue", [*arguments, "--format=%i|%T|%M|%L|%N|%r"], TIMEOUT_S)
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise DistlmError(f"squeue: {done.stderr.strip() or f'exit code {done.returncode}'}")
    found = []
    for line in done.stdout.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 6:
            name, state, elapsed, left, nodes, reason = fields
            left = left if state == "RUNNING" else ""
            found.append(Job(name, state, elapsed, left, nodes, "" if reason == "None" else reason))
    return found


def _sacct(ids: Sequence[str]) -> list[Job]:
    """Empty where accounting is switched off or does not answer."""
    arguments = ["--allocations", "--noheader", "--parsable2", f"--jobs={','.join(_parents(ids))}"]
    if shutil.which("sacct") is None:
        return []
    try:
        done = _run("sacct", [*arguments, "--format=JobID,State,Elapsed,NodeList"], TIMEOUT_S)
    except DistlmError:
        return []
    found = []
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        fields = line.strip().split("|")
        if len(fields) == 4:
            name, state, elapsed, nodes = fields
            # "CANCELLED by 1000" is the state and who did it.
            word, _, by = state.partition(" ")
            found.append(Job(name, word, elapsed, "", "" if nodes == "None assigned" else nodes, by))
    return found


def details(job: str) -> dict[str, str]:
    """`scontrol show job`: field → value (values with blanks are cut); empty when Slurm has forgotten the job."""
    if not installed():
        return {}
    done = _run("scontrol", ["--oneliner", "show", "job", job], TIMEOUT_S)
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout.partition("\n")[0])) if done.returncode == 0 else {}


def cancel(ids: Sequence[str]) -> None:
    """End jobs: TERM to their ranks, KILL after the site's KillWait. One that has ended meanwhile is no error."""
    done = _run("scancel", ids, TIMEOUT_S)
    said = [line for line in done.stderr.splitlines() if not any(ended in line for ended in _HAS_ENDED)]
    if done.returncode != 0 and (said or not done.stderr):
        raise DistlmError(f"scancel {' '.join(ids)}: {said[-1] if said else f'exit code {done.returncode}'}")


def signal_steps(job: str, name: str) -> None:
    """A signal to every rank of the job's steps; the batch script itself does not get it."""
    command("scancel", f"--signal={name}", job)


def requeue(job: str) -> None:
    """Stop a running job at once, or take an ended one that Slurm still knows, and queue it again under its id."""
    command("scontrol", "requeue", job)


def _matching(job: str, found: Sequence[Job]) -> list[Job]:
    return [each for each in found if each.id == job or each.id.startswith(f"{job}_")]


def _parents(ids: Sequence[str]) -> list[str]:
    """Ids without array tasks, each once: squeue refuses a list in which one task has been forgotten."""
    return list(dict.fromkeys(each.partition("_")[0] for each in ids))


def _run(tool: str, arguments: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    # A user's own format or sort order in the environment would change what is parsed here.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SQUEUE_", "SACCT_", "SCANCEL_"))}
    try:
        return subprocess.run([tool, *arguments], env=env, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError as error:
        raise DistlmError(
            f"{tool}: not found, so there is no Slurm on this machine; run this on a login node of the cluster"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise DistlmError(
            f"{tool}: no answer from Slurm within {timeout:g} s; is its controller up? (scontrol ping)"
        ) from error
