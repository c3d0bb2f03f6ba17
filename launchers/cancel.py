"""End the jobs of a run: python -m launchers.cancel RUN_DIR_OR_RECIPE [--stage STAGE]

Ranks that run get SIGTERM, and save where the site's KillWait (30 s by default) is long enough for a step and a save.
Complete work is always kept. A cancelled job does not come back by itself; `distlm requeue` lets it go on.
"""

import argparse
import os
import signal
from collections.abc import Sequence

from launchers.jobs import (
    add_runs,
    command_line,
    front_process,
    front_state,
    named_runs,
    note,
    run_command,
    submissions,
    with_states,
)
from launchers.stages import slurm


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = command_line("cancel", "End the jobs of runs.", add_arguments)
    run_command("cancel", lambda: cancel(parser.parse_intermixed_args(arguments)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cancel` takes."""
    add_runs(parser)
    parser.add_argument("--stage", default="", help="only the jobs of this stage")


def cancel(options: argparse.Namespace) -> int:
    """Cancel what waits or runs; says what it did."""
    for run in named_runs(options.words):
        listed = with_states([each for each in submissions(run) if options.stage in ("", each.stage)])
        ids = [found.job for found, states in listed if found.job and any(state.active for state in states)]
        if ids:
            for found, _ in listed:
                if found.job in ids:
                    # First: a job that is just being queued again ends by this when it starts.
                    note(run, found, cancelled=True)
            # The last stage first: what waits must not start because what it waits for has gone.
            slurm.cancel(ids[::-1])
            print(f"{run.root}: cancelled {', '.join(ids)}")
        ended = 0
        for found, _ in listed:
            if found.owner != "deepspeed" or (found.job and found.job in ids):
                continue
            if process := front_process(found):
                os.kill(process, signal.SIGTERM)
                print(f"{run.root}: {found.stage}: SIGTERM to process {process}; its ranks stop after a step")
                ended += 1
            elif front_state(found) == "RUNNING":
                where = f"ssh {found.host} kill {found.pid}"
                print(f"{run.root}: {found.stage} runs from another machine; end it there: {where}")
                ended += 1
        if not ids and not ended:
            print(f"{run.root}: no job waits or runs")
    return 0


if __name__ == "__main__":
    main()
