"""What is done with a run directory as a whole: clean, metrics, sweep, verify."""

import argparse
import os
import sys
from pathlib import Path

from distlm.commands.shared import Add, print_once, refuse_ranks
from distlm.config.load import load_config, split_words
from distlm.errors import EXIT_DONE, EXIT_ERROR, DistlmError
from distlm.runtime.ranks.world import World

_VALUES = "values stand between commas: knn.nprobe=1,8,32 index.factory=IVF64,PQ8,IVF64,SQ8"


def add_verbs(add: Add) -> None:
    """clean, metrics, sweep, verify."""
    summary = "remove a run's search, index, datastore or training, and all that was made from it"
    child = add("clean", summary, _clean, takes=None)
    child.add_argument("run", metavar="RUN_DIR", help="a run directory, or a recipe for its run_dir")
    child.add_argument("what", metavar="search|index|datastore|train", help="each takes the ones before it along")
    child.add_argument("--only", default="", metavar="NAME", help="one index by name, or one question by its label")
    child.add_argument("--dry-run", action="store_true", help="print what would be removed, with its size, and stop")
    summary = "what a run has measured: the last value of every metric, or all of them as CSV"
    child = add("metrics", summary, _metrics, takes=None, alone=True)
    child.add_argument("run", metavar="RUN_DIR", help="a folder with metrics.jsonl in it, or a recipe for its run_dir")
    child.add_argument("--csv", action="store_true", help="time, stage, step, name and value of each, on stdout")
    summary = "ask a store every combination of some settings, and compare the answers"
    child = add("sweep", summary, _sweep, takes=("RECIPE section.key=value,value", _VALUES), stage="knn")
    child.add_argument("--dry-run", action="store_true", help="print the questions, and stop")
    summary = "read every file of a run, or of a part of it, and compare it with what was written"
    child = add("verify", summary, _verify, takes=None)
    child.add_argument(
        "place", metavar="RUN_DIR|FOLDER|FILE", help="a run directory, a folder or file of one, a recipe"
    )


def _clean(options: argparse.Namespace, world: World) -> int:
    from distlm.clean import as_text, doomed, remove

    refuse_ranks(world, "clean", "is for one process")
    root = _root(options.run)
    things = doomed(root, options.what, options.only)
    if not options.dry_run:
        remove(things)
    return print_once(as_text(things, removed=not options.dry_run), world)


def _metrics(options: argparse.Namespace, _world: World) -> int:
    from distlm.runtime.metrics import MetricsFile, metrics_table, write_csv

    record = MetricsFile(_root(options.run) / "metrics.jsonl")
    if not record.path.is_file():
        raise DistlmError(f"{record.path}: no metrics yet; the stages of a run write them, `distlm train` first of all")
    try:
        if options.csv:
            write_csv(record.read(), sys.stdout)
        else:
            print(metrics_table(record.read()))
        sys.stdout.flush()
    except BrokenPipeError:
        # `... | head`: nobody reads on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_DONE


def _verify(options: argparse.Namespace, world: World) -> int:
    from distlm.runtime.ranks.collective import rank0_first
    from distlm.runtime.ranks.comm import open_comm
    from distlm.verify import parts_below, table, verify

    comm = open_comm(world)
    place = Path(options.place) if Path(options.place).is_file() else _root(options.place)
    parts = rank0_first(comm, lambda: parts_below(place))
    problems = verify(comm, place, parts)
    if world.rank == 0:
        for problem in problems:
            print(f"FAIL {problem}", file=sys.stderr)
        print(table(place, parts, problems), flush=True)
    comm.close()
    return EXIT_ERROR if problems else EXIT_DONE


def _root(word: str) -> Path:
    """The run directory of a path or of a recipe."""
    if "/" in word or Path(word).is_dir():
        return Path(word)
    return Path(load_config(word).run_dir)


def _sweep(options: argparse.Namespace, world: World) -> int:
    from distlm.sweep import run_sweep

    refuse_ranks(world, "sweep", "starts the ranks itself")
    recipe, overrides = split_words(options.words)
    return run_sweep(recipe, overrides, options.dry_run)
