"""Let a run's jobs start again: python -m launchers.requeue RUN_DIR_OR_RECIPE [--stage STAGE] [--now]

A running job is asked to stop after a checkpoint; its owner (the batch script, or submitit) then queues it again. With
--now Slurm ends it at once. An ended job that Slurm still knows is queued again under its id, another is submitted
again; a held one is released. Jobs that waited for it, and that Slurm has given up, are submitted again after it.
"""

import argparse
from collections.abc import Sequence

from distlm.errors import DistlmError
from distlm.runtime.rundir import RunDir
from launchers.jobs import (
    Submission,
    add_runs,
    command_line,
    named_runs,
    note,
    run_command,
    submissions,
    with_states,
)
from launchers.stages import slurm
from launchers.stages.resubmit import resubmit

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
    parser.add_argument("--stage", default="", help="only the jobs of this stage, and what waits for them")
    parser.add_argument("--now", action="store_true", help="end running jobs at once, without a checkpoint")


def requeue(options: argparse.Namespace) -> int:
    """Requeue the newest job of each stage, and what waits for it; says what it did.

    Raises DistlmError when there is none to requeue.
    """
    for run in named_runs(options.words):
        newest = {each.name or each.stage: each for each in submissions(run) if each.job}
        chain = _Chain(run, options.stage, options.now)
        done = [text for each, states in with_states(list(newest.values())) for text in chain.one(each, states)]
        if not done:
            known = ", ".join(each.job for each in newest.values()) or "none recorded"
            raise DistlmError(
                f"{run.root}: no job to requeue (jobs: {known}); submit it again, it continues where it stopped"
            )
        print("\n".join(done))
    return 0


class _Chain:
    """The jobs of a run in order, so that those which wait for one that comes back wait for it again."""

    def __init__(self, run: RunDir, stage: str, now: bool) -> None:
        self.run, self.stage, self.now = run, stage, now
        self.back: dict[str, str] = {}
        """Id of a job that comes back → its id from now on."""

    def one(self, found: Submission, states: Sequence[slurm.Job]) -> list[str]:
        """Do what this job's state asks for; what was done."""
        if waits_for := [self.back[before] for before in found.after if before in self.back]:
            return self._dependent(found, states, waits_for)
        if self.stage not in ("", found.stage):
            return []
        if found.cancelled:
            note(self.run, found, cancelled=False)
        done = [text for job in states if (text := self._root(found, job))]
        if self.back.get(found.job) == found.job:
            # After all tasks of an array: the jobs wait for the whole of it.
            freed = slurm.release_dependents(found.job)
            done += [f"job {each}: waits for it again" for each in freed]
        return done

    def _root(self, found: Submission, job: slurm.Job) -> str:
        name = f"job {job.id} ({found.stage})"
        if job.state == "RUNNING" and not self.now:
            slurm.signal_steps(job.id, _SIGNALS.get(found.owner, "USR2"))
            return f"{name}: asked to stop after a checkpoint; {found.owner} requeues it"
        if job.state == "RUNNING" or job.state in _FAILED:
            return self._bring_back(found, job, name)
        if job.state in ("REQUEUE_HOLD", "SPECIAL_EXIT") or "held" in job.reason.lower():
            slurm.command("scontrol", "release", job.id)
            return f"{name}: released, was held"
        if job.state == "PENDING":
            return f"{name}: waits already ({job.reason or 'in the queue'})"
        return ""

    def _bring_back(self, found: Submission, job: slurm.Job, name: str) -> str:
        try:
            slurm.requeue(job.id)
        except slurm.SlurmSilent:
            raise
        except DistlmError:
            # Slurm has forgotten it, or lets no job be requeued.
            if found.owner != "submitit" or job.id != found.job:
                raise
            self.back[found.job] = new = resubmit(self.run, found, [])
            return f"{name}: submitted again as job {new}, was {job.state}"
        self.back[found.job] = found.job
        return f"{name}: requeued, was {job.state}"

    def _dependent(self, found: Submission, states: Sequence[slurm.Job], after: list[str]) -> list[str]:
        """A job of submit that waits for one which comes back: Slurm has cancelled it, as it could never start."""
        if any(job.active for job in states):
            if list(found.after) != after:
                slurm.command("scontrol", "update", f"jobid={found.job}", f"dependency=afterok:{':'.join(after)}")
                note(self.run, found, after=after)
            return []
        if all(job.state == "COMPLETED" for job in states):
            return []
        self.back[found.job] = new = resubmit(self.run, found, after)
        return [f"job {found.job} ({found.stage}): submitted again as job {new}, after {', '.join(after)}"]


if __name__ == "__main__":
    main()
