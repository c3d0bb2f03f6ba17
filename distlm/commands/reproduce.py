"""All runs of a paper's table."""

import argparse
from pathlib import Path
from typing import Any

from distlm.commands.shared import print_once, refuse_ranks
from distlm.errors import UsageError
from distlm.runtime.ranks.world import World


def add_verb(verbs: Any, help_wanted: bool) -> None:
    """`distlm reproduce`."""
    from distlm.reproduce.experiment import experiment_help

    summary = "all runs of a paper's table, each resumable, then the table"
    child = verbs.add_parser(
        "reproduce", help=summary, description=summary, epilog=experiment_help() if help_wanted else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    child.set_defaults(handler=_reproduce, print_config=False)
    child.add_argument("words", nargs="+", metavar="EXPERIMENT INPUT=FOLDER section.key=value",
                       help="settings are those of every run")  # fmt: skip
    child.add_argument("--scale", default="small", help="small (default; CPU cores), paper, or another that it has")
    child.add_argument("--into", default="", help="folder of the runs; default: runs/EXPERIMENT")
    child.add_argument("--only", default="", help="these runs and what they need, separated by commas")
    child.add_argument("--at-once", type=int, default=1, help="runs that go on at the same time; default 1")
    child.add_argument("--dry-run", action="store_true", help="print every command, and stop")
    child.add_argument("--tables", action="store_true", help="only write the tables of what is finished")


def _reproduce(options: argparse.Namespace, world: World) -> int:
    from distlm.reproduce.experiment import load_experiment
    from distlm.reproduce.run import plan_experiment, run_experiment, write_tables

    refuse_ranks(world, "reproduce", "starts the ranks itself")
    names = [word for word in options.words if "=" not in word]
    if len(names) != 1:
        raise UsageError(f"expected one experiment, found {', '.join(names) or 'none'}; see distlm reproduce --help")
    given = [word.partition("=") for word in options.words if "=" in word]
    inputs = {key: value for key, _, value in given if "." not in key}
    overrides = [f"{key}={value}" for key, _, value in given if "." in key]
    root = Path(options.into or f"runs/{names[0]}").absolute()
    only = options.only.split(",") if options.only else []
    experiment = load_experiment(names[0], root, inputs, overrides, only, options.scale)
    if options.dry_run:
        return print_once(plan_experiment(experiment), world)
    if options.tables:
        return print_once(write_tables(experiment), world)
    if options.at_once < 1:
        raise UsageError(f"--at-once {options.at_once}: must be at least 1")
    return run_experiment(experiment, options.at_once)
