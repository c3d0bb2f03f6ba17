"""Queues a job again whose ranks have stopped or died; called by the job itself.

python -m launchers.again STAGE RECIPE [section.key=value ...]      in the batch script, after the ranks

Exits 0: it is queued again, or a successor is; 75: it is not (cancelled, out of time, refused, no answer from Slurm for
slurm.ASK_FOR_S); 1: the guard ends it (launchers/guard.py); 2: usage. The reason is on standard error.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distlm.config.load import load_config, split_words
from distlm.config.schema import RunConfig
from distlm.errors import EXIT_STOPPED, DistlmError
from distlm.runtime.rundir import RunDir
from launchers.guard import check_restart, times_preempted
from launchers.jobs import note, own_job, submissions
from launchers.site import Site, load_site
from launchers.stages import slurm
from launchers.stages.resubmit import resubmit

OWNER = "batch script"
"""Who asks here, for the log and the record of restarts."""


@dataclass(frozen=True)
class Outcome:
    """What became of the request."""

    queued: bool
    words: str


def queue_again(
    stage: str, config: RunConfig, *, owner: str, max_same_start: int, again: int, patience_s: float
) -> Outcome:
    """Have this process's job queued again: under its id or, where Slurm refuses that, as a successor.

    `again`: how often the job may come back after it was preempted in a way that ends it (0: a preemption is the end),
    or have a successor. Raises DistlmError when the guard ends the job, SlurmSilent when Slurm does not answer for
    `patience_s`.
    """
    run, job, restarts = RunDir.of(config), own_job(), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    times = times_preempted(run, stage, job)
    state = slurm.patiently(lambda: slurm.own_state(job, restarts), patience_s, log)
    if state == "REQUEUED" or any(each.follows == job for each in submissions(run)):
        # By Slurm itself, by hand, or by rank 0 before its batch script.
        return Outcome(True, "requeued from outside; it continues where it stopped")
    if refusal := _refusal(run, state, times, again):
        return Outcome(False, refusal)
    ended = check_restart(
        stage, config, job=job, owner=owner, restarts=restarts, max_same_start=max_same_start,
        preempted=state == "PREEMPTED",
    )  # fmt: skip
    if ended:
        raise DistlmError(ended)

    def requeue() -> Outcome:
        now = slurm.own_state(job, restarts)
        if refused := _refusal(run, now, times, again):
            # Cancelled since.
            return Outcome(False, refused)
        if now != "REQUEUED":
            slurm.requeue(job)
        return Outcome(True, f"requeued by this {owner}; it continues where it stopped")

    try:
        return slurm.patiently(requeue, patience_s, log)
    except slurm.SlurmSilent:
        raise
    except DistlmError as error:
        refusal = f"requeue refused: submit the same command again, it continues where it stopped ({error})"
        return Outcome(False, refusal) if times >= again else _successor(run, job, refusal)


def log(text: str) -> None:
    """A line for the log of the job."""
    print(f"launchers: {text}", file=sys.stderr, flush=True)


def _refusal(run: RunDir, state: str, times: int, again: int) -> str | None:
    if state == "CANCELLED":
        return "not requeued: cancelled or out of time"
    if state == "PREEMPTED" and times >= again:
        left = f"it came back {times} times already" if again else "`again: N` in the site file lets jobs come back"
        return f"not requeued: Slurm cancelled it for another job ({left}); distlm requeue {run.root}"
    return None


def _successor(run: RunDir, job: str, refusal: str) -> Outcome:
    """Submit the job under another id, and let what waits for it wait for that one."""
    listed = submissions(run)
    found = next((each for each in listed if each.job == job and each.owner == "submitit"), None)
    if found is None:
        # A batch script's flags are known to who typed them, and a task of an array has no id to wait for.
        return Outcome(False, refusal)
    new = resubmit(run, found, [], follows=job)
    for each in listed:
        if job in each.after:
            after = [new if before == job else before for before in each.after]
            try:
                slurm.command("scontrol", "update", f"jobid={each.job}", f"dependency=afterok:{':'.join(after)}")
            except DistlmError as error:
                # The successor is what matters; the rest of the chain can be brought back.
                log(f"job {each.job} ({each.stage}) does not wait for it: {error}")
                continue
            note(run, each, after=after)
    return Outcome(True, f"this job cannot be requeued; job {new} continues where it stopped")


def _at_least(least: int) -> Callable[[str], int]:
    """The type of an option, with the bound of the site file."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of batch scripts."""
    parser = argparse.ArgumentParser(prog="python -m launchers.again", description="Queue this job again.")
    parser.add_argument("--site", metavar="FILE", help="site file, for max_same_start and again")
    parser.add_argument("--max-same-start", type=_at_least(1), metavar="N", help="instead of the site file's")
    parser.add_argument("--again", type=_at_least(0), metavar="N", help="instead of the site file's")
    parser.add_argument("stage", metavar="STAGE")
    parser.add_argument("words", nargs="+", metavar="RECIPE section.key=value", help="in any order")
    options = parser.parse_intermixed_args(arguments)
    try:
        limits = (options.max_same_start, options.again)
        site = load_site(options.site)[0] if None in limits else Site()
        outcome = queue_again(
            options.stage,
            load_config(*split_words(options.words)),
            owner=OWNER,
            max_same_start=site.max_same_start if options.max_same_start is None else options.max_same_start,
            again=site.again if options.again is None else options.again,
            patience_s=slurm.ASK_FOR_S,
        )
    except slurm.SlurmSilent as error:
        log(f"not requeued: {error}; submit the same command again, it continues where it stopped")
        sys.exit(EXIT_STOPPED)
    except DistlmError as error:
        print(f"launchers.again: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    log(outcome.words)
    sys.exit(0 if outcome.queued else EXIT_STOPPED)


if __name__ == "__main__":
    main()
