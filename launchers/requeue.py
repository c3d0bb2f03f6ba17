"""Let a run's jobs start again: python -m launchers.requeue RUN_DIR_OR_RECIPE [--stage STAGE] [--now]

A running job is asked to stop after a checkpoint; its owner (the batch script, or submitit) then queues it again. With
--now Slurm ends it at once. An ended job that Slurm still knows is queued again; a held one is released.
"""

import argparse
from collections.abc import Sequence

from distlm.errors import DistlmError
from launchers.jobs import Submission, add_runs, command_line, named_runs, run_command, submissions, with_states
from launchers.stages import slurm

# The one that each owner's handler expects; distlm takes both alike.
_SIGNALS = {"sbatch": "USR1"}
_FAILED = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = command_line("requeue", "Let the jobs of runs start again.", add_arguments)
    run_command("requeue", lambda: requeue(parser.parse_intermixed_args(arguments)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `requeue` takes."""
    add_runs(parser)
    parser.add_argument("--stage", default="", help="only the jobs of this stage")
    parser.add_argument("--now", action="store_true", help="end running jobs at once, without a checkpoint")


def requeue(options: argparse.Namespace) -> int:
    """Requeue the newest job of each stage; says what it did. Raises DistlmError when there is none to requeue."""
    for run in named_runs(options.words):
        found = [each for each in submissions(run) if each.job and options.stage in ("", each.stage)]
        newest = {each.stage: each for each in found}
        done = [text for each, states in with_states(list(newest.values())) for text in _one(each, states, options.now)]
        if not done:
            known = ", ".join(each.job for each in newest.values()) or "none recorded"
            raise DistlmError(
                f"{run.root}: no job to requeue (jobs: {known}); submit it again, it continues where it stopped"
            )
        print("\n".join(done))
    return 0


def _one(found: Submission, states: Sequence[slurm.Job], now: bool) -> list[str]:
    done = []
    for job in states:
        if job.state == "RUNNING" and not now:
            slurm.signal_steps(job.id, _SIGNALS.get(found.owner, "USR2"))
            done.append(f"job {job.id} ({found.stage}): asked to stop after a checkpoint; {found.owner} requeues it")
        elif job.state == "RUNNING" or job.state in _FAILED:
            slurm.requeue(job.id)
            done.append(f"job {job.id} ({found.stage}): requeued, was {job.state}")
        elif job.state in ("REQUEUE_HOLD", "SPECIAL_EXIT") or "held" in job.reason.lower():
            slurm.command("scontrol", "release", job.id)
            done.append(f"job {job.id} ({found.stage}): released, was held")
        elif job.state == "PENDING":
            done.append(f"job {job.id} ({found.stage}): waits already ({job.reason or 'in the queue'})")
    return done


if __name__ == "__main__":
    main()
