"""Logs of a run's ranks: python -m launchers.logs RUN_DIR_OR_RECIPE [--rank K | --all] [--follow]

Of the newest job that has written any; --stage or --job choose another.
"""

import argparse
import os
import re
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distlm.errors import DistlmError
from distlm.runtime.rundir import RunDir
from launchers.jobs import LAUNCH, Submission, add_runs, command_line, named_runs, run_command, submissions
from launchers.stages import slurm

_LOGS = (".log", ".out", ".err")


@dataclass(frozen=True)
class Log:
    """A file of one rank, or of the batch script (rank None)."""

    path: Path
    rank: int | None
    task: int | None = None
    """Number in its array."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = command_line("logs", "Print or follow the logs of a run's ranks.", add_arguments)
    run_command("logs", lambda: show(parser.parse_intermixed_args(arguments)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `logs` takes."""
    add_runs(parser)
    parser.add_argument("--stage", default="", help="of the newest job of this stage")
    parser.add_argument("--job", default="", help="of this job")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, default=0, help="default: 0")
    which.add_argument("--all", action="store_true", help="all ranks, and the batch script")
    parser.add_argument("--lines", type=int, default=40, help="from the end of each file (default: %(default)s)")
    parser.add_argument("--follow", action="store_true", help="go on as the files grow, until Ctrl-C")
    parser.add_argument("--paths", action="store_true", help="print the paths only")


def show(options: argparse.Namespace) -> int:
    """Print, or become `tail -F`. Raises DistlmError when there is nothing to show."""
    run = named_runs(options.words)[0]
    logs = newest_logs(run, options.stage, options.job)
    chosen = logs if options.all else of_rank(logs, options.rank)
    if not chosen:
        ranks = sorted({log.rank for log in logs if log.rank is not None})
        there = f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "only the batch script's (--all)"
        raise DistlmError(f"{run.root}: no log of rank {options.rank}; there are {there}")
    if options.paths:
        print("\n".join(str(log.path) for log in chosen))
        return 0
    if options.follow:
        # -F: a requeued job may make its files anew.
        sys.stdout.flush()
        os.execvp("tail", ["tail", "-n", str(options.lines), "-F", *(str(log.path) for log in chosen)])
    for log in chosen:
        print(f"==> {log.path} <==")
        with log.path.open(encoding="utf-8", errors="replace") as stream:
            sys.stdout.writelines(deque(stream, options.lines))
        print()
    return 0


def newest_logs(run: RunDir, stage: str = "", job: str = "") -> list[Log]:
    """Logs of the newest submission that has any. DistlmError when none has."""
    found = [each for each in submissions(run) if stage in ("", each.stage) and job in ("", each.job)]
    for each in reversed(found):
        if logs := find_logs(run, each):
            return logs
    named = " ".join(filter(None, [stage and f"of stage {stage}", job and f"of job {job}"]))
    if not found:
        if not named and (logs := _plain_logs(run)):
            return logs
        raise DistlmError(f"{run.root}: no submission {named or 'yet'} in {LAUNCH}/jobs.jsonl, and no log")
    raise DistlmError(f"{run.root}: {len(found)} submission(s) {named}, none of which has written a log yet")


def find_logs(run: RunDir, found: Submission, ask: bool = True) -> list[Log]:
    """A submission's files: those of its own folder, else those with the job's id in their name, ranks in order.

    `ask`: Slurm, where the job writes.
    """
    own = Path(found.log) if found.log else None
    if own is not None and own.is_dir():
        ranks = (re.fullmatch(r"rank-(\d+)\.log", path.name) for path in own.glob("rank-*.log"))
        return sorted((Log(own / each[0], int(each[1])) for each in ranks if each), key=_order)
    if not found.job:
        return [Log(own, 0)] if own is not None and own.is_file() else []
    files = {path for folder in (run.root / LAUNCH, run.logs) for path in folder.rglob(f"*{found.job}*")}
    for near in (own, Path(slurm.details(found.job).get("StdOut", "") if ask else "")):
        if near is not None and near.is_absolute():
            files |= set(near.parent.glob(f"*{found.job}*"))
    # `%j_%t` of the scripts, `%A_%a_%t_log.out` of submitit; the id must not be a part of a longer number.
    pattern = re.compile(rf"(?:^|.*\D){found.job}((?:_\d+)*)(?:\D.*)?")
    logs = []
    for path in files:
        if path.suffix in _LOGS and path.is_file() and (match := pattern.fullmatch(path.name)):
            numbers = [int(number) for number in match[1].split("_")[1:]]
            if len(numbers) == 1 and path.name.endswith(f"_{numbers[0]}.out"):
                # The batch script of one task of an array (%A_%a.out).
                logs.append(Log(path, None, numbers[0]))
                continue
            task = numbers[0] if len(numbers) > 1 else None
            logs.append(Log(path, numbers[-1] if numbers else None, task))
    return sorted(logs, key=_order)


def of_rank(logs: Sequence[Log], rank: int) -> list[Log]:
    """Logs of one rank (of every task of an array); the batch script's own where there is no other."""
    return [log for log in logs if log.rank == rank] or ([] if rank else [log for log in logs if log.rank is None])


def _plain_logs(run: RunDir) -> list[Log]:
    """What `distlm run` wrote without a job: one file a stage, the newest."""
    files = sorted(run.logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
    return [Log(files[-1], 0)] if files else []


def _order(log: Log) -> tuple[int, int, str]:
    return (-1 if log.task is None else log.task, -1 if log.rank is None else log.rank, log.path.name)


if __name__ == "__main__":
    main()
