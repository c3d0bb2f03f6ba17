"""Submits the stages of a recipe, each after the one before it, with submitit.

python -m launchers.submit RECIPE [section.key=value ...]            to Slurm where it is, else on this machine
python -m launchers.submit RECIPE --ranks 8 --nodes 2 --dry-run      the scripts and where each rank goes
python -m launchers.submit RECIPE --cluster local --ranks 2          on this machine, submitit's processes
python -m launchers.submit RECIPE --cluster debug                    in this process, one rank

Finished stages are not submitted, so the same command continues a run. Stages that a time limit or a preemption stops
are requeued and continue by themselves. Exit codes: as distlm (0, 1, 2, 75).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distlm.config.load import dump_config, load_config, split_words
from distlm.config.recipe import recipe_names
from distlm.config.schema import RunConfig
from distlm.errors import EXIT_DONE, DistlmError, UsageError
from distlm.pipeline import check_settings, show_results
from distlm.runtime.files import atomic_path, bytes_hash
from distlm.runtime.rundir import RunDir
from launchers.site import Site, StageSettings, load_site
from launchers.stages.dispatch import clean_environment, log_of, run_debug, run_local, submit_slurm, submitted_before
from launchers.stages.flags import check_conditions
from launchers.stages.graph import Wish, build_graph, choose_stages, pending_stages
from launchers.stages.render import Plan, executor, placement
from launchers.stages.snapshot import snapshot_path, source_tree, take_snapshot


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        sys.exit(submit(_parse(sys.argv[1:] if arguments is None else arguments)))
    except DistlmError as error:
        print(f"launchers.submit: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("launchers.submit: stopped; the same command continues", file=sys.stderr)
        sys.exit(130)


def submit(options: argparse.Namespace) -> int:
    """Check, plan, and submit or show. Returns the exit code; raises DistlmError for what cannot work."""
    config = load_config(*split_words(options.words))
    # Jobs may start in another folder than this one.
    config.run_dir = os.path.realpath(config.run_dir)
    run, front = RunDir.of(config), _front(options)
    site, source = load_site(options.site)
    check_conditions("--after", options.after)
    site = replace(site, after=[*site.after, *options.after])
    chosen = choose_stages(options.stages, options.array)
    run.refuse_other_config(config, "knn")
    stages = pending_stages(config, chosen)
    if not stages:
        print(f"{run.root}: complete; nothing to submit ({', '.join(chosen)})")
        return EXIT_DONE
    if {"prepare", "shard"} & set(stages):
        # A run that begins: what `distlm run` would refuse must not wait in a queue first.
        check_settings(config)
    wish = Wish(options.nodes, options.ranks, options.array, options.time)
    if front != "slurm":
        site, wish = _here(front, site, wish, config), replace(wish, nodes=1)
    plan = Plan(
        config, site, build_graph(config, site, stages, wish),
        recipe=run.root / "launch" / f"recipe-{bytes_hash(dump_config(config).encode())[:12]}.yaml",
        folder=run.root / "launch" / "submitit" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        code=snapshot_path(run.root) if options.snapshot and front != "debug" else source_tree(),
        cwd=Path.cwd(),
    )  # fmt: skip
    if options.dry_run:
        print(_dry_run(plan, front, source))
        return EXIT_DONE
    if options.test_only:
        return _test_only(plan)
    if front == "slurm" and (active := submitted_before(run)):
        raise DistlmError(
            f"{run.root}: jobs {', '.join(active)} of an earlier submission still wait or run; wait for them, or end "
            f"them with scancel {' '.join(active)}, and submit again"
        )
    _write_files(plan, snapshot=options.snapshot and front != "debug")
    print(f"run directory: {run.root}\ncode: {plan.code}")
    if front == "slurm":
        _print_submitted(plan, submit_slurm(plan))
        return EXIT_DONE
    (run_local if front == "local" else run_debug)(plan)
    if not pending_stages(config):
        show_results(config, run)
    return EXIT_DONE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launchers.submit",
        allow_abbrev=False,
        description="Submit the stages of a recipe, each after the one before it; finished ones are left out.",
        epilog=f"Recipes: {', '.join(recipe_names())}. Settings are given as section.key=value.",
    )
    add_arguments(parser)
    options, extras = parser.parse_known_args(arguments)
    for extra in extras:
        if "=" not in extra:
            raise UsageError(f"unknown argument {extra!r}; settings are given as section.key=value")
    options.words = [*options.words, *extras]
    return options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `submit` takes."""
    parser.add_argument("words", nargs="*", metavar="RECIPE section.key=value", help="in any order")
    parser.add_argument("--cluster", choices=["slurm", "local", "debug"], help="default: slurm where sbatch is")
    parser.add_argument("--site", metavar="FILE", help="site file (default: $DISTLM_SITE, ./site.yaml, ~/.config/…)")
    parser.add_argument("--stages", default="", metavar="A,B or A..B", help="only these stages")
    parser.add_argument("--nodes", type=_positive, metavar="N", help="nodes of each parallel stage")
    parser.add_argument("--ranks", type=_positive, metavar="N", help="ranks of each parallel stage, over its nodes")
    parser.add_argument("--array", type=_positive, metavar="N", help="datastore and index-add as arrays of N jobs")
    parser.add_argument("--time", type=_positive, metavar="MIN", help="time limit of one start of each job, in minutes")
    parser.add_argument(
        "--after", action="append", default=[], metavar="afterok:ID",
        help="what the first job also waits for, as sbatch --dependency takes it; besides the site file's",
    )  # fmt: skip
    parser.add_argument("--no-snapshot", dest="snapshot", action="store_false", help="run the code where it lies")
    parser.add_argument("--dry-run", action="store_true", help="print scripts and placement; touch nothing")
    parser.add_argument("--test-only", action="store_true", help="ask sbatch --test-only when each job would start")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 or more")
    return int(text)


def _front(options: argparse.Namespace) -> str:
    front: str = options.cluster or ("slurm" if shutil.which("sbatch") else "local")
    if options.test_only and front != "slurm":
        raise UsageError(f"--test-only asks Slurm, and the cluster is {front!r}; use --dry-run")
    if front == "slurm" and not options.dry_run and shutil.which("sbatch") is None:
        raise DistlmError(
            "sbatch: not found, so there is no Slurm on this machine; submit on a login node of the cluster, or use "
            "--cluster local or --dry-run"
        )
    if front != "slurm" and (options.nodes or 1) > 1:
        raise UsageError(f"--nodes {options.nodes}: --cluster {front} is this one machine; use --ranks")
    if front != "slurm" and options.after:
        raise UsageError(f"--after {options.after[0]}: --cluster {front} knows no jobs of Slurm")
    if front == "debug" and ((options.ranks or 1) > 1 or options.array):
        raise UsageError("--cluster debug runs one rank in this process; use --cluster local for more")
    return front


def _here(front: str, site: Site, wish: Wish, config: RunConfig) -> Site:
    """The site's settings for this machine: its own GPUs, and as many ranks as the recipe says."""
    ranks = 1 if front == "debug" else wish.ranks or config.launch.ranks
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) if visible is None else len(visible.split(",")) * bool(visible)
    # The shape of stages is the cluster's; only their arrays are kept.
    arrays = {} if front == "debug" else {name: StageSettings(array=own.array) for name, own in site.stages.items()}
    return replace(site, tasks_per_node=ranks, gpus_per_node=gpus, cpus_per_task=1, stages=arrays)


def _dry_run(plan: Plan, front: str, source: str) -> str:
    lines = [f"# site: {source}; front: {front}; nothing is submitted", f"# run directory: {plan.config.run_dir}"]
    lines += ["# requeue: submitit, after a checkpoint; the guard ends restarts without progress"]
    for job in plan.jobs:
        waits = job.after or (plan.site.after if front == "slurm" else ())
        after = f"; after {', '.join(waits)}" if waits else ""
        lines += ["", f"# --- {placement(job)}{after}".replace("\n", "\n# ")]
        if front == "slurm":
            after_ids = [f"<{name}>" for name in job.after]
            made = executor(plan, job, after_ids)
            lines.append(made.text(job.shares).rstrip())
    return "\n".join(lines)


def _test_only(plan: Plan) -> int:
    """What Slurm would do with each job if it were submitted now (without waiting for the ones before)."""
    for job in plan.jobs:
        made = executor(plan, job, [])
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
            script.write(made.text(job.shares))
            script.flush()
            asked = subprocess.run(
                ["sbatch", "--test-only", script.name],
                env=clean_environment(os.environ), capture_output=True, text=True,
            )  # fmt: skip
        words = (asked.stderr or asked.stdout).strip()
        if asked.returncode != 0:
            raise DistlmError(f"sbatch refuses {job.name}: {words}; see the site file (distlm site show)")
        print(f"{job.name}: {words.removeprefix('sbatch: ')}")
    return EXIT_DONE


def _write_files(plan: Plan, snapshot: bool) -> None:
    plan.folder.mkdir(parents=True)
    with atomic_path(plan.recipe) as temporary:
        temporary.write_text(dump_config(plan.config), "utf-8")
    if snapshot and take_snapshot(Path(plan.config.run_dir)) != plan.code:
        raise DistlmError("the code was edited while it was copied; submit again")


def _print_submitted(plan: Plan, ids: dict[str, str]) -> None:
    for job in plan.jobs:
        shape = f"{job.ranks} rank(s) on {job.resources.nodes} node(s)"
        shape = f"array of {job.shares}" if job.shares else shape
        after = f", after {', '.join(f'{ids[name]} ({name})' for name in job.after)}" if job.after else ""
        print(f"job {ids[job.name]}: {job.name}, {shape}{after}")
    first = plan.jobs[0]
    print(f"follow the first: tail -F {log_of(plan, first, ids[first.name], 'slurm')}\nlogs of all: {plan.folder}")


if __name__ == "__main__":
    main()
