"""What a run is doing: python -m launchers.status RUN_DIR_OR_RECIPE ... [--json]

Jobs and their states (squeue, then sacct where accounting works; without Slurm from files alone), finished stages,
progress, rate and time left from metrics.jsonl, and the command that follows the log.
"""

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from distlm.config.load import load_config
from distlm.config.schema import RunConfig
from distlm.errors import DistlmError
from distlm.models.registry import kind
from distlm.runtime.alive import FOLDER as ALIVE
from distlm.runtime.metrics import (
    PROGRESS_DONE,
    PROGRESS_ETA,
    PROGRESS_RATE,
    PROGRESS_TOTAL,
    PROGRESS_UNIT,
    TRAIN_LOSS,
    VALID_PPL,
    Line,
    line_of,
)
from distlm.runtime.progress import format_seconds
from distlm.runtime.rundir import RunDir
from launchers.guard import attempts, restarts_of
from launchers.jobs import Submission, add_runs, command_line, named_runs, run_command, submissions, with_states
from launchers.logs import find_logs, newest_logs, of_rank
from launchers.records import JobStatus, Progress, Status
from launchers.stages import slurm
from launchers.stages.graph import SPECS

_TAIL_BYTES = 1 << 20
"""Of metrics.jsonl: thousands of lines, many times what is written between two progress lines."""
_FROM_OUTSIDE = ("PREEMPTED", "NODE_FAIL", "TIMEOUT", "DEADLINE", "BOOT_FAIL")
"""States of jobs that Slurm ended, and that would go on where they stopped."""
_RATE_OVER = 50
"""Training lines from which the rate is taken."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = command_line("status", "What runs are doing.", add_arguments)
    run_command("status", lambda: show(parser.parse_intermixed_args(arguments)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `status` takes."""
    add_runs(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument(
        "--stale-after", type=float, default=300, metavar="S",
        help="say so when a running job has written no line to metrics.jsonl for so long (default: %(default)s s)",
    )  # fmt: skip


def show(options: argparse.Namespace) -> int:
    """Print the status of every run named."""
    found = [status_of(run, options.stale_after) for run in named_runs(options.words)]
    if options.json:
        print(json.dumps([each.tree() for each in found], indent=1))
    else:
        print("\n\n".join(as_text(each, time.time()) for each in found))
    return 0


def status_of(run: RunDir, stale_after_s: float = 300) -> Status:
    """Gather it. Where Slurm is not there or does not answer, from the files of the run alone."""
    found, silent = submissions(run), ""
    try:
        listed = _relevant(with_states(found))
    except slurm.SlurmSilent as error:
        silent = str(error)
        listed = _relevant([(each, [_last_known(run, each)]) for each in found])
    recorded = run.root / "config.yaml"
    config = load_config(str(recorded)) if recorded.exists() else None
    progress = read_progress(run.root / "metrics.jsonl")
    jobs = [_about(each, states) for each, states in listed]
    stale = None
    running = [job for job in jobs if job.state.startswith("RUNNING")]
    if running:
        newest = max(_started(job) for job in running)
        silence_s = time.time() - max(newest, progress.time if progress else 0)
        stale = silence_s if silence_s > stale_after_s else None
    return Status(
        run_dir=str(run.root), stages=_stages(config, run) if config else {}, jobs=jobs, progress=progress,
        imports=config is not None and kind(config.model.kind).imports(config), stale_s=stale,
        follow=_follow(run, [each for each, _ in listed], ask=not silent), silent=silent,
    )  # fmt: skip


def read_progress(metrics: Path) -> Progress | None:
    """The newest progress of a metrics.jsonl; None where nothing is written yet. Reads the end of the file only."""
    lines = _tail(metrics)
    if not lines:
        return None
    newest = next((line for line in reversed(lines) if line.number(PROGRESS_DONE) is not None), None)
    training = [(line.step, line) for line in lines if line.step is not None and line.number(TRAIN_LOSS) is not None]
    values = {
        name: value for name in (TRAIN_LOSS, VALID_PPL) for line in lines if (value := line.number(name)) is not None
    }
    last = lines[-1].time
    if training and (newest is None or (newest.stage == "train" and training[-1][1].time >= newest.time)):
        return _of_training([(step, line.time) for step, line in training], newest, last, values)
    if newest is None:
        return Progress(lines[-1].stage, 0, None, "", None, None, last, values)
    shown = values if newest.stage == "train" else {}
    unit = str(newest.values.get(PROGRESS_UNIT, ""))
    return Progress(
        newest.stage, _count(newest, PROGRESS_DONE) or 0, _count(newest, PROGRESS_TOTAL), unit,
        newest.number(PROGRESS_RATE), newest.number(PROGRESS_ETA), last, shown,
    )  # fmt: skip


def as_text(status: Status, now: float) -> str:
    """For people."""
    lines = [status.run_dir]

    def row(name: str, text: str) -> None:
        lines.append(f"  {name:<9} {text}")

    active = {job.stage for job in status.jobs if job.state.startswith("RUNNING")}
    words = {True: "done", False: "not yet", None: "unknown"}

    def state(name: str, done: bool | None) -> str:
        return "imported" if done and name == "train" and status.imports else words[done]

    shown = (f"{name} {'running' if name in active else state(name, done)}" for name, done in status.stages.items())
    if status.stages:
        row("stages", ", ".join(shown))
    for job in status.jobs:
        facts = [
            " ".join(filter(None, [job.stage, job.state, job.elapsed, job.nodes and f"on {job.nodes}"])),
            job.left and f"{job.left} left to its limit",
            job.restarts and f"{job.restarts} restarts",
            job.reason and f"({job.reason})",
            f"submitted with {job.owner}",
        ]
        row(f"job {job.job}" if job.job else "process", ", ".join(str(fact) for fact in facts if fact))
    if status.progress is not None:
        row("progress", _progress_text(status.progress, now))
    if status.stale_s is not None:
        row("STALE", f"a job runs, but nothing was written for {format_seconds(status.stale_s)}: look at its log")
    if status.silent:
        row("SLURM", f"did not answer, so this is what the run directory knows: {status.silent}")
    for job in status.jobs:
        if job.state.startswith(_FROM_OUTSIDE) and status.stages.get(job.stage) is not True:
            why = "Slurm ended it for another job" if job.state.startswith("PREEMPTED") else "Slurm ended it"
            row(job.state, f"job {job.job} ({job.stage}): {why}; it does not come back by itself: "
                f"distlm requeue {shlex.quote(status.run_dir)}")  # fmt: skip
    if not status.jobs:
        row("jobs", "none were submitted (launch/jobs.jsonl)")
    if status.follow:
        row("follow", status.follow)
    return "\n".join(lines)


def _progress_text(progress: Progress, now: float) -> str:
    parts = []
    if progress.total:
        percent = 100 * progress.done / progress.total
        parts.append(f"{progress.done}/{progress.total} {progress.unit} ({percent:.0f}%)")
    if progress.rate:
        parts.append(f"{progress.rate:.3g}/s")
    if progress.left_s is not None and progress.done < (progress.total or 0):
        parts.append(f"{format_seconds(progress.left_s)} left")
    parts += [f"{name.rpartition('/')[2]} {value:.4g}" for name, value in progress.values.items()]
    age = format_seconds(max(0.0, now - progress.time))
    return f"{progress.stage}: {', '.join(parts) or 'begun'} (last line {age} ago)"


def _of_training(
    lines: Sequence[tuple[int, float]], newest: Line | None, last: float, values: dict[str, float]
) -> Progress:
    """`lines`: step and time of each."""
    recent = lines[-_RATE_OVER:]
    # A restart goes back in steps: the rate is that of the lines after it.
    for index in range(len(recent) - 1, 0, -1):
        if recent[index][0] <= recent[index - 1][0]:
            recent = recent[index:]
            break
    steps, seconds = recent[-1][0] - recent[0][0], recent[-1][1] - recent[0][1]
    rate = steps / seconds if steps > 0 and seconds > 0 else None
    total = _count(newest, PROGRESS_TOTAL) if newest else None
    left = (total - recent[-1][0]) / rate if total and rate else None
    return Progress("train", recent[-1][0], total, "updates", rate, left, last, values)


def _count(line: Line, name: str) -> int | None:
    value = line.number(name)
    return None if value is None else int(value)


def _tail(path: Path) -> list[Line]:
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _TAIL_BYTES))
            texts = stream.read().splitlines()[1 if size > _TAIL_BYTES else 0 :]
    except FileNotFoundError:
        return []
    # One may be cut by a kill, or just being written.
    return [line for text in texts if (line := line_of(text)) is not None]


def _stages(config: RunConfig, run: RunDir) -> dict[str, bool | None]:
    finished: dict[str, bool | None] = {}
    for name, spec in SPECS.items():
        if not spec.verbs_of(config):
            continue
        try:
            finished[name] = spec.finished(config, run)
        except (DistlmError, OSError):
            finished[name] = None
    return finished


def _relevant(listed: list[tuple[Submission, list[slurm.Job]]]) -> list[tuple[Submission, list[slurm.Job]]]:
    """The newest submission of each job, and all that can still run."""
    newest = {found.name or found.stage: index for index, (found, _) in enumerate(listed)}
    return [
        (found, states)
        for index, (found, states) in enumerate(listed)
        if index == newest[found.name or found.stage] or any(state.active for state in states)
    ]


def _last_known(run: RunDir, found: Submission) -> slurm.Job:
    """A job as the run directory knows it: by the newest of its lines and of its ranks' signs of life."""
    events = [(found.time, "submitted")]
    path = attempts(run, found.stage)
    restarts = [line for line in restarts_of(path) if found.job in (line.job, line.job.partition("_")[0])]
    events += [(line.time, "asked to start again") for line in restarts]
    beats = [file.stat().st_mtime for file in (run.root / ALIVE).glob("*/rank-*.json")]
    events += [(max(beats), "ranks of this run gave a sign of life")] if beats else []
    at, what = max(events)
    what = "cancelled by `distlm cancel`" if found.cancelled else f"{what} {format_seconds(time.time() - at)} ago"
    return slurm.Job(found.job, slurm.UNKNOWN, reason=f"last known: {what}")


def _about(found: Submission, states: Sequence[slurm.Job]) -> JobStatus:
    counts = Counter(state.state for state in states)
    shown = ", ".join(f"{count} {name}" for name, count in counts.items()) if len(states) > 1 else states[0].state
    if "RUNNING" in counts and len(states) > 1:
        shown = f"RUNNING ({shown})"
    first = next((state for state in states if state.state == "RUNNING"), states[0])
    details = slurm.details(found.job) if found.job and first.active else {}
    return JobStatus(
        job=found.job, stage=found.stage, owner=found.owner, state=shown, elapsed=first.elapsed,
        left="" if first.left in ("UNLIMITED", "NOT_SET") else first.left, nodes=first.nodes,
        restarts=int(details.get("Restarts", 0)), reason=first.reason, time=found.time,
    )  # fmt: skip


def _started(job: JobStatus) -> float:
    """When this start of a job began, Unix seconds."""
    return time.time() - _seconds(job.elapsed) if job.elapsed else job.time


def _seconds(text: str) -> int:
    """Slurm's [days-]hours:minutes:seconds or minutes:seconds."""
    days, _, clock = text.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = total * 60 + (int(part) if part.isdigit() else 0)
    return total + 86400 * int(days or 0)


def _follow(run: RunDir, listed: Sequence[Submission], ask: bool) -> str:
    for found in reversed(listed):
        if logs := of_rank(find_logs(run, found, ask), 0):
            return f"tail -F {shlex.quote(str(logs[0].path))}"
    try:
        return f"tail -F {shlex.quote(str(of_rank(newest_logs(run), 0)[0].path))}"
    except (DistlmError, IndexError):
        return ""


if __name__ == "__main__":
    main(sys.argv[1:])
