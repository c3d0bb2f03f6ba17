"""All runs of a paper's table."""

import argparse
from pathlib import Path

from distlm.commands.shared import Add, print_once, refuse_ranks
from distlm.errors import UsageError
from distlm.runtime.ranks.world import World


def add_verb(add: Add) -> None:
    """`distlm reproduce`."""
    child = add(
        "reproduce", "all runs of a paper's table, each resumable, then the table", _reproduce,
        takes=("EXPERIMENT INPUT=FOLDER section.key=value", "settings are those of every run"),
        arguments=_add_experiments,
    )  # fmt: skip
    child.add_argument("--scale", default="small", help="small (default; CPU cores), paper, or another that it has")
    child.add_argument("--into", default="", help="folder of the runs; default: runs/EXPERIMENT")
    child.add_argument("--only", default="", help="these runs and what they need, separated by commas")
    child.add_argument("--at-once", type=int, default=1, help="runs that go on at the same time; default 1")
    child.add_argument("--dry-run", action="store_true", help="print every command, and stop")
    child.add_argument("--tables", action="store_true", help="only write the tables of what is finished")


def _add_experiments(parser: argparse.ArgumentParser) -> None:
    from distlm.reproduce.experiment import experiment_help

    parser.epilog = experiment_help()


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
