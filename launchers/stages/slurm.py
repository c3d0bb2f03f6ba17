"""What is asked of Slurm: squeue, sacct, scontrol, scancel, with parseable formats, timeouts and clear errors."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from distlm.errors import DistlmError

TIMEOUT_S = 30.0
"""A busy or dead controller lets its clients wait for minutes."""
ASK_FOR_S = 900.0
"""How long a job that must be queued again asks a controller that does not answer: a restart of one takes minutes."""
_PAUSE_S = 5.0
"""Between two such questions."""
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
          "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT")  # fmt: skip
"""States of a job that can still run. Others are final."""
_HAS_ENDED = ("Invalid job id", "already completing or completed")
"""What scancel says of a job that Slurm has forgotten, and of one that it still knows."""
_IS_QUEUED = "Job is pending execution"
"""What scontrol requeue says of a job that waits."""
_SILENT = ("Unable to contact slurm controller", "Socket timed out", "Zero Bytes", "onnection refused",
           "onnection timed out", "onnection failure", "connect failure", "Communication",
           "Unexpected message")  # fmt: skip
"""In what the commands say when the controller does not answer."""
_T = TypeVar("_T")
UNKNOWN = "UNKNOWN"
"""State of a job that neither squeue nor sacct knows: ended long ago, or another cluster's."""


class SlurmSilent(DistlmError):
    """The controller did not answer; asked later, it may."""


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

    Raises DistlmError when there is no Slurm or when it refuses, SlurmSilent when it does not answer in `timeout`
    seconds.
    """
    done = _run(tool, arguments, timeout)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise _error(f"{tool} {' '.join(arguments)}: {said[-1]}")
    return done.stdout


def patiently(ask: Callable[[], _T], seconds: float, say: Callable[[str], None]) -> _T:
    """What `ask` returns, asked again for `seconds` while Slurm does not answer; raises its last SlurmSilent then."""
    deadline = time.monotonic() + seconds
    told = False
    while True:
        try:
            return ask()
        except SlurmSilent as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                say(f"{error}; asking again for {seconds / 60:g} min")
            told = True
            time.sleep(min(_PAUSE_S, seconds))


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
        raise _error(f"squeue: {done.stderr.strip() or f'exit code {done.returncode}'}")
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
    return fields(done.stdout) if done.returncode == 0 else {}


def fields(shown: str) -> dict[str, str]:
    """Field → value of the first job in what `scontrol --oneliner show job` prints (values with blanks are cut)."""
    return dict(re.findall(r"(\w+)=(\S*)", shown.partition("\n")[0]))


def cancel(ids: Sequence[str]) -> None:
    """End jobs: TERM to their ranks, KILL after the site's KillWait. One that has ended meanwhile is no error."""
    done = _run("scancel", ids, TIMEOUT_S)
    said = [line for line in done.stderr.splitlines() if not any(ended in line for ended in _HAS_ENDED)]
    if done.returncode != 0 and (said or not done.stderr):
        raise _error(f"scancel {' '.join(ids)}: {said[-1] if said else f'exit code {done.returncode}'}")


def signal_steps(job: str, name: str) -> None:
    """A signal to every rank of the job's steps; the batch script itself does not get it."""
    command("scancel", f"--signal={name}", job)


def own_state(job: str, restarts: int) -> str:
    """How Slurm sees the job that asks, which began as its start number `restarts` + 1.

    RUNNING: nobody else has decided about it; PREEMPTED: cancelled to make room for another job (where Slurm requeues
    preempted jobs itself, REQUEUED); CANCELLED: by hand, or out of time. Raises DistlmError, SlurmSilent.
    """
    shown = fields(command("scontrol", "--oneliner", "show", "job", job))
    if shown.get("JobState") == "RUNNING":
        return "RUNNING"
    # All of them are COMPLETING while the ranks save. A cancelled job could be requeued, too, and must not be.
    if int(shown.get("Restarts", 0)) > restarts:
        return "REQUEUED"
    return "CANCELLED" if shown.get("PreemptTime", "None") == "None" else "PREEMPTED"


def release_dependents(job: str) -> list[str]:
    """Let jobs wait again that waited for `job` (which has just been requeued) and could never start; their ids."""
    asked = ["--noheader", "--me", "--states=PENDING", "--format=%i|%r|%E"]
    freed = []
    for line in command("squeue", *asked).splitlines():
        waiting, reason, conditions = line.strip().split("|", 2)
        wanted = re.sub(r"\([^)]*\)", "", conditions)
        # An array is 12_* there, one of its tasks 12_3.
        named = {each.partition("_")[0] for each in re.split(r"[:,?]", wanted)}
        if reason == "DependencyNeverSatisfied" and job in named:
            command("scontrol", "update", f"jobid={waiting}", f"dependency={wanted}")
            freed.append(waiting)
    return freed


def requeue(job: str) -> None:
    """Stop a running job at once, or take an ended one that Slurm still knows, and queue it again under its id."""
    done = _run("scontrol", ["requeue", job], TIMEOUT_S)
    # Below 0: inside that job Slurm took the request, and ended scontrol with the rest of it before it could say so.
    # One task of an array brings all back that never started.
    if done.returncode > 0 and _IS_QUEUED not in done.stderr:
        raise _error(f"scontrol requeue {job}: {done.stderr.strip() or f'exit code {done.returncode}'}")


def submit(script: Path, env: Mapping[str, str]) -> str:
    """`sbatch SCRIPT` with this environment; the job's id."""
    done = _run("sbatch", ["--parsable", str(script)], TIMEOUT_S, env)
    if done.returncode != 0:
        raise _error(f"sbatch {script}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]


def _error(text: str) -> DistlmError:
    return (SlurmSilent if any(words in text for words in _SILENT) else DistlmError)(text)


def _matching(job: str, found: Sequence[Job]) -> list[Job]:
    return [each for each in found if each.id == job or each.id.startswith(f"{job}_")]


def _parents(ids: Sequence[str]) -> list[str]:
    """Ids without array tasks, each once: squeue refuses a list in which one task has been forgotten."""
    return list(dict.fromkeys(each.partition("_")[0] for each in ids))


def _run(
    tool: str, arguments: Sequence[str], timeout: float, env: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    # A user's own format or sort order in the environment would change what is parsed here.
    env = {key: value for key, value in env.items() if not key.startswith(("SQUEUE_", "SACCT_", "SCANCEL_"))}
    try:
        return subprocess.run([tool, *arguments], env=env, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError as error:
        raise DistlmError(
            f"{tool}: not found, so there is no Slurm on this machine; run this on a login node of the cluster"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmSilent(
            f"{tool}: no answer from Slurm within {timeout:g} s; is its controller up? (scontrol ping)"
        ) from error
