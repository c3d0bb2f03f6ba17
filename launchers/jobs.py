"""The record of a run's jobs: RUN/launch/jobs.jsonl, a line for each submission, and the runs that a command names.

python -m launchers.jobs STAGE [--log FILE] RECIPE [section.key=value ...]     a Slurm job records itself

A line is a launchers.records.JobLine.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msgspec import UNSET

from distlm.config.load import load_config, split_words
from distlm.config.recipe import is_run_dir
from distlm.errors import EXIT_STOPPED, DistlmError, UsageError
from distlm.runtime.files import json_of
from distlm.runtime.rundir import RunDir
from launchers.hosts.rank import process_start
from launchers.records import JobLine, StartSpec
from launchers.stages import slurm

LAUNCH = "launch"
"""Folder of a run directory in which the launchers keep their files."""
BEAT_WITHIN_S = 60.0
"""A front that lives has written its order.json that recently."""


@dataclass(frozen=True)
class Submission:
    """One line of the record."""

    time: float
    stage: str
    job: str
    """Slurm's job id; empty where Slurm did not start it."""
    owner: str
    nodes: str
    log: str = ""
    """File of rank 0 or folder of all ranks, where the writer named one."""
    host: str = ""
    """Machine of a deepspeed front."""
    pid: int = 0
    """Its process there."""
    name: str = ""
    """submitit: name of the job, which may be one of several of a stage."""
    after: tuple[str, ...] = ()
    """submitit: ids of the jobs of this run that it waits for."""
    follows: str = ""
    """submitit: the job that it goes on for."""
    cancelled: bool = False
    """Ended by `distlm cancel`, and not let go on since."""


def record_job(run: RunDir, stage: str, job: str, owner: str, nodes: str, **more: Any) -> None:
    """Append a JobLine; `more`: its further fields.

    Lines are short, so that writers on several nodes do not mix theirs.
    """
    path = run.root / LAUNCH / "jobs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = JobLine(time=round(time.time(), 3), stage=stage, job=job, owner=owner, nodes=nodes, **more)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line.line() + "\n")


def submissions(run: RunDir) -> list[Submission]:
    """All submissions of a run, oldest first; a job that was recorded twice (a requeue records again) counts once.

    Later lines of a job say what has become of it (after, cancelled).

    Raises DistlmError for a line that is whole, and no JobLine.
    """
    path = run.root / LAUNCH / "jobs.jsonl"
    if not path.exists():
        return []
    found: dict[object, Submission] = {}
    cancelled: dict[str, bool] = {}
    after: dict[str, tuple[str, ...]] = {}
    for number, text in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        try:
            tree = json_of(text)
        except ValueError:
            # Cut by a kill.
            continue
        line = JobLine.of(tree, Path(f"{path}:{number}"))
        slurm_id = line.job if line.job[:1].isdigit() and line.front != "local" else ""
        if slurm_id and line.cancelled is not UNSET:
            cancelled[slurm_id] = bool(line.cancelled)
        if slurm_id and line.after is not UNSET:
            after[slurm_id] = tuple(line.after or ())
        found.setdefault(
            (slurm_id, line.stage) if slurm_id else number,
            Submission(
                line.time, line.stage, slurm_id, line.owner, line.nodes, line.logs or line.log or "", line.host or "",
                line.pid or 0, line.name or "", follows=line.follows or "",
            ),
        )  # fmt: skip
    return [
        replace(each, after=after.get(each.job, ()), cancelled=cancelled.get(each.job, False))
        for each in found.values()
    ]


def was_cancelled(run: RunDir, job: str) -> bool:
    """Whether `distlm cancel` ended this job (`12_3`: or its whole array) and nobody let it go on since."""
    return any(each.cancelled for each in submissions(run) if each.job in (job, job.partition("_")[0]))


def note(run: RunDir, found: Submission, **more: Any) -> None:
    """Another line for a job that is recorded: what has become of it (JobLine: after, cancelled)."""
    record_job(run, found.stage, found.job, found.owner, found.nodes, **more)


def with_states(found: Sequence[Submission]) -> list[tuple[Submission, list[slurm.Job]]]:
    """Each submission with its job (or the tasks of its array) as they are now; one question to Slurm for all."""
    shown = slurm.jobs([each.job for each in found if each.job and each.owner != "deepspeed"])
    return [(each, shown.get(each.job) or [slurm.Job(each.job, front_state(each))]) for each in found]


def front_state(found: Submission) -> str:
    """RUNNING, ENDED or UNKNOWN for a start that is no job of its own: from its process or from its front's beat."""
    if front_process(found):
        return "RUNNING"
    if found.host == socket.gethostname():
        return "ENDED"
    try:
        silent_s = time.time() - (Path(found.log) / "order.json").stat().st_mtime
    except OSError:
        return slurm.UNKNOWN
    return "RUNNING" if silent_s < BEAT_WITHIN_S else "ENDED"


def front_process(found: Submission) -> int:
    """Process of a deepspeed front where it runs on this machine; else 0."""
    spec = StartSpec.peek(Path(found.log) / "spec.json")
    if spec is None or spec.front.node != socket.gethostname():
        return 0
    return spec.front.pid if process_start(spec.front.pid) == spec.front.started else 0


def named_runs(words: Sequence[str]) -> list[RunDir]:
    """Runs that the arguments name: run directories, or one recipe (or run directory) with its overrides.

    Raises DistlmError when a run directory is not there yet.
    """
    folders = [Path(word) for word in words if is_run_dir(word)]
    rest = [word for word in words if not is_run_dir(word)]
    if len(folders) == 1 and rest and not any(_is_recipe(word) for word in rest):
        # The words of the command that was submitted.
        folders = [Path(load_config(*split_words(words)).run_dir)]
    elif rest:
        folders.append(Path(load_config(*split_words(rest)).run_dir))
    if not folders:
        raise UsageError("expected run directories, or a recipe with its settings")
    for folder in folders:
        if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", LAUNCH, "logs")):
            raise DistlmError(f"{folder}: no run here yet (no config.yaml, metrics.jsonl or launch/ in it)")
    return [RunDir(folder) for folder in folders]


def _is_recipe(word: str) -> bool:
    return "=" not in word or Path(word).exists()


def command_line(
    program: str, summary: str, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> argparse.ArgumentParser:
    """Parser of a command that looks after runs."""
    parser = argparse.ArgumentParser(prog=f"python -m launchers.{program}", description=summary)
    add_arguments(parser)
    return parser


def add_runs(parser: argparse.ArgumentParser) -> None:
    """The argument of a command that looks after runs."""
    parser.add_argument(
        "words", nargs="+", metavar="RUN_DIR_OR_RECIPE", help="run directories, or a recipe and section.key=value ..."
    )


def run_command(program: str, function: Callable[[], int]) -> None:
    """Call `function` and exit with what it returns; a DistlmError becomes one line and its exit code."""
    try:
        sys.exit(function())
    except DistlmError as error:
        print(f"launchers.{program}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # `... | head`: nobody reads on.
        sys.stderr.close()
        sys.exit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Called in the body of a batch script, once a start. Exits 0, 2 for a wrong recipe, or 75: it was cancelled."""
    parser = argparse.ArgumentParser(prog="python -m launchers.jobs", description="Record this Slurm job in its run.")
    parser.add_argument("stage", metavar="STAGE")
    parser.add_argument("words", nargs="+", metavar="RECIPE section.key=value")
    parser.add_argument("--log", default="", help="log of rank 0")
    run_command("jobs", lambda: _record_this(parser.parse_intermixed_args(arguments)))


def own_job() -> str:
    """How scontrol names the job around this process: `12`, or `12_3` for task 3 of array 12.

    One of the numbers that an array's tasks also have is the whole array's. Raises UsageError outside a job.
    """
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not (job := os.environ.get("SLURM_JOB_ID", "")):
        raise UsageError("SLURM_JOB_ID is not set: this is for the inside of a Slurm job")
    return job


def say_cancelled(job: str) -> None:
    """Why a start of `job` ends at once: Slurm took a requeue just before the cancellation."""
    print(
        f"launchers: job {job} was ended by `distlm cancel`, so this start ends at once; distlm requeue lets it go on",
        file=sys.stderr,
    )


def _record_this(options: argparse.Namespace) -> int:
    recipe, overrides = split_words(options.words)
    run = RunDir.of(load_config(recipe, overrides))
    job = own_job()
    if was_cancelled(run, job):
        say_cancelled(job)
        return EXIT_STOPPED
    more = {"log": os.path.abspath(options.log)} if options.log else {}  # noqa: PTH100 (the file need not exist yet)
    # An array counts as one job: what is said of it later is for its tasks, too, that have not started yet.
    job = os.environ.get("SLURM_ARRAY_JOB_ID", job)
    record_job(run, options.stage, job, "sbatch", os.environ.get("SLURM_JOB_NODELIST", ""), **more)
    return 0


if __name__ == "__main__":
    main()
