"""The `distlm` command: `distlm VERB RECIPE [section.key=value ...]`, one verb per stage."""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from distlm import __version__
from distlm.commands import index, jobs, models, recipes, report, reproduce, runs, store
from distlm.commands.parser import Commands
from distlm.commands.shared import config_of, one_line, print_once, refuse_ranks
from distlm.config.check import position_warnings
from distlm.config.load import load_config, run_classes, split_words
from distlm.config.recipe import is_recipe
from distlm.config.schema import RunConfig
from distlm.config.settings import format_help
from distlm.errors import EXIT_DONE, EXIT_ERROR, DistlmError, UsageError
from distlm.runtime.progress import say
from distlm.runtime.ranks.world import ALONE, World, refuse_script_body, resolve_world
from distlm.runtime.rundir import STAGES, refuse_foreign_stage, stage_sections
from distlm.runtime.stage import open_stage
from distlm.runtime.stop import end_at_once
from distlm.system_errors import of_system, system_error
from distlm.verbs import EVALUATE_FINETUNED, SHARED_VERBS, STAGE_VERBS, Verb

_TRACEBACK = "DISTLM_TRACEBACK"
"""Environment variable: not empty, an error also shows where in the code it came up."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exits 0 done, 1 error, 2 usage, 75 stopped after a checkpoint."""
    world: World | None = None
    # A name that is no UTF-8, or a λ where the terminal has no Greek, must not end what was about to be told.
    for stream in (sys.stdout, sys.stderr):
        # A stream that was put in the place of another may refuse to be looked at.
        with suppress(OSError):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    # torch's sockets warn of every host name that has no reverse entry.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        options = _commands().parse(sys.argv[1:] if arguments is None else arguments)
        # A command that only watches runs may start in a place with other ranks, e.g. in the shell of a job.
        world = ALONE if getattr(options, "alone", False) else resolve_world()
        if "verb" not in options:
            # No stage; those that start stages listen themselves.
            end_at_once()
        code = (recipes.print_config if options.print_config else options.handler)(options, world)
    except DistlmError as error:
        _leave_with(error, world, ends=arguments is None)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if of_system(error):
            _leave_with(system_error(error), world, ends=arguments is None)
        traceback.print_exc()
        _leave_ranks(world, EXIT_ERROR)
    if arguments is None:
        _leave_group()
    sys.exit(code)


def _leave_with(error: DistlmError, world: World | None, ends: bool) -> None:
    if os.environ.get(_TRACEBACK):
        traceback.print_exception(error)
    several = world is not None and world.size > 1
    if not (several and error.shared and world.rank != 0):  # type: ignore[union-attr]
        who = f"[rank {world.rank} on {world.node}] " if several else ""  # type: ignore[union-attr]
        print(f"{who}distlm: {error}", file=sys.stderr, flush=True)
    if error.shared:
        if ends:
            _leave_group()
        sys.exit(error.exit_code)
    _leave_ranks(world, error.exit_code)


def _leave_group() -> None:
    """Close torch's process group where a stage made one: its threads abort an interpreter that ends before them.

    Only at the end of a process: DeepSpeed keeps the first group it saw for good and fails in a second one.
    """
    if "torch.distributed" in sys.modules:
        group = sys.modules["torch.distributed"]
        if group.is_available() and group.is_initialized():
            group.destroy_process_group()


def _leave_ranks(world: World | None, code: int) -> None:
    """Exit one rank of many at once: an orderly MPI_Finalize would wait for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if world is not None and world.size > 1:
        os._exit(code)
    sys.exit(code)


def _commands() -> Commands:
    commands = Commands(
        description="Memory-augmented language models over many nodes.",
        epilog="`distlm recipes` lists the recipes, `distlm VERB --help` the settings that a verb reads, and `distlm "
               "config --help` every setting.",
        version=f"distlm {__version__}",
        settings_help=_settings_help,
    )  # fmt: skip
    add = commands.add
    child = add("run", "all stages of a recipe in order, finished ones skipped", _run_pipeline, stage="knn")
    child.add_argument("--dry-run", action="store_true", help="print every stage's plan and command, and stop")
    _add_no_self_test(child)
    _add_no_verify(child)
    for verb in STAGE_VERBS:
        child = add(verb.words, verb.summary, _run_stage, verb=verb, stage=verb.stage)
        child.add_argument("--dry-run", action="store_true", help="print the plan (work, disk, memory, time) and stop")
        if verb.words == "index merge":
            index.add_join(child, _run_stage)
        if verb.words == "finetune":
            child.add_argument("--evaluate-only", dest="verb", action="store_const", const=EVALUATE_FINETUNED,
                               help="train nothing: score the models that finetune.keep_models has kept (or the one of "
                                    "finetune.checkpoint) on dev, and write their predictions")  # fmt: skip
        if verb.words in ("knn search", "knn evaluate"):
            _add_no_self_test(child)
        _add_no_verify(child)
    child = add("plan", "what every stage needs on several rank counts, from rates measured here", _plan, stage="knn")
    child.add_argument("--measure", action="store_true", help="first run training and datastore in small, on made-up "
                       "text, for a minute or two: their times are then right for this machine")  # fmt: skip
    child.add_argument("--ranks", type=int, nargs="+", default=[], help="rank counts; default: launch.ranks")
    child.add_argument("--rows", type=int, default=0, help="keys of the datastore; default: the run's")
    child.add_argument(
        "--rates", default="", metavar="FILE", help="measured rates (JSON): made, or used if it is there"
    )
    store.add_verbs(add)
    index.add_verbs(add)
    report.add_verbs(add)
    reproduce.add_verb(add)
    models.add_verbs(commands)
    runs.add_verbs(add)
    jobs.add_verbs(add)
    recipes.add_verbs(add, commands)
    child = add("doctor", "check this machine and environment", _doctor, takes=None)
    child.add_argument("--json", action="store_true", help="machine-readable output")
    child.add_argument("--cluster", action="store_true", help="check all ranks of this start together, e.g. under srun")
    child.add_argument("--folder", default=".", help="with --cluster: where runs will live; default: this folder")
    return commands


def _add_no_self_test(child: argparse.ArgumentParser) -> None:
    child.add_argument("--no-self-test", action="store_true", help="knn.self_test=false; the results will say so")


def _add_no_verify(child: argparse.ArgumentParser) -> None:
    child.add_argument("--no-verify", action="store_true", help="launch.verify=false: read files without comparing "
                       "them with their checksums; results will say so")  # fmt: skip


def _settings_help(stage: str, arguments: Sequence[str]) -> str:
    """Help of the settings that a verb reads: of the recipe's kind of model where one is named, else of all kinds."""
    try:
        recipe, overrides = split_words([word for word in arguments if "=" in word or is_recipe(word)])
        cls = type(load_config(recipe, overrides))
        names = [name for name, found in run_classes().items() if found is cls]
    except UsageError:
        cls, names = None, list(run_classes())
    if stage not in STAGES:
        return format_help((), cls)
    return format_help([section for name in names for section in stage_sections(stage, name)], cls)


def _load(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def _run_stage(options: argparse.Namespace, world: World) -> int:
    verb: Verb = options.verb
    config = config_of(options)
    refuse_foreign_stage(config, verb.stage, verb.words)
    if verb.recorded:
        config = _load(verb.recorded)(config, world.rank)
    if options.dry_run:
        return print_once(
            _load(verb.plan)(config, config.launch.ranks if world.size == 1 else world.size).line(), world
        )
    if verb.ranks:
        refuse_script_body(world)
    if config.launch.share and verb.words not in SHARED_VERBS:
        raise UsageError(
            f"launch.share={config.launch.share}: `distlm {verb.words}` has no shares; "
            f"only {' and '.join(SHARED_VERBS)} do"
        )
    if verb.stage in ("datastore", "knn"):
        _warn(config, world)
    with open_stage(verb.stage, config, world) as stage:
        summary = _load(verb.function)(stage)
    if world.rank == 0:
        print(f"{verb.words}: {one_line(summary)}", flush=True)
    return EXIT_DONE


def _run_pipeline(options: argparse.Namespace, world: World) -> int:
    config = config_of(options)
    from distlm.pipeline import plan_pipeline, run_pipeline

    refuse_ranks(world, "run", "starts the ranks itself")
    _warn(config, world)
    if options.dry_run:
        return print_once(plan_pipeline(config, options.recipe, options.overrides), world)
    return run_pipeline(config, options.recipe, options.overrides)


def _plan(options: argparse.Namespace, world: World) -> int:
    from distlm.plan_sheet import plan_sheet
    from distlm.runtime.stage import set_threads

    refuse_ranks(world, "plan", "measures one process")
    config = config_of(options)
    if options.measure:
        from distlm.trial.run import try_in_small

        code = try_in_small(config, options.recipe, options.overrides)
        if code != EXIT_DONE:
            return code
    set_threads(config.launch.threads, world)
    rates = Path(options.rates) if options.rates else None
    return print_once(plan_sheet(config, options.ranks or [config.launch.ranks], options.rows, rates), world)


def _doctor(options: argparse.Namespace, world: World) -> int:
    from distlm.runtime.doctor.checks import render
    from distlm.runtime.doctor.machine import report

    if options.cluster:
        from distlm.runtime.doctor.cluster import cluster_checks

        refuse_script_body(world)
        text, healthy = render(cluster_checks(world, Path(options.folder).absolute()), options.json, launched=True)
    else:
        text, healthy = report(world, as_json=options.json)
    print_once(text, world)
    return EXIT_DONE if healthy else EXIT_ERROR


def _warn(config: RunConfig, world: World) -> None:
    for warning in position_warnings(config):
        say(warning, world.rank)
