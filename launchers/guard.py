"""Ends a loop of restarts that bring nothing: called by the one owner of a job's requeue, before it requeues.

python -m launchers.guard STAGE RECIPE [section.key=value ...]      exits 0: requeue; 1: do not, with the reason

Every call adds a line to RUN/launch/attempts-STAGE.jsonl with the progress mark of the next start: what is durable in
the run directory at that moment. A mark that stands still over `max_same_start` (site file) restarts ends the loop.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from distlm.config.load import load_config
from distlm.config.schema import RunConfig
from distlm.datastore.manifest import SIDECARS, is_complete
from distlm.errors import DistlmError
from distlm.index.layout import IndexFolder
from distlm.runtime.files import json_of
from distlm.runtime.rundir import RunDir
from launchers.records import RestartLine
from launchers.site import check_stage, load_site


def _train(_config: RunConfig, run: RunDir) -> str:
    complete = run.complete_checkpoints()
    return complete[-1].name if complete else "no checkpoint"


def _datastore(_config: RunConfig, run: RunDir) -> str:
    if is_complete(run.datastore):
        return "complete"
    return f"{_count(run.datastore, SIDECARS)} shards"


def _search(config: RunConfig, run: RunDir) -> str:
    # Kinds apart: finished units replace found ones, so a plain sum could stand still while work goes on.
    kinds = ("found/unit-*", "rescore/*.npy", "unit-*", "manifest.json")
    counts = {
        split: [_count(run.neighbours(split), kind) for kind in kinds] + [_count(run.cache(split), "**/*")]
        for split in config.knn.splits
    }
    return ", ".join(f"{split} {'+'.join(map(str, found))}" for split, found in counts.items())


def _evaluate(_config: RunConfig, run: RunDir) -> str:
    return "+".join(path.name for path in (run.tuned, run.results) if path.exists()) or "nothing"


def _finetune(_config: RunConfig, run: RunDir) -> str:
    seeds = run.root / "finetune"
    steps = sorted(marker.parent.name for marker in seeds.glob("*/seed-*/checkpoints/step-*/complete.json"))
    return f"{_count(seeds, '*/seed-*/result.json')} seeds, {', '.join(steps) or 'no checkpoint'}"


MARKS: dict[str, Callable[[RunConfig, RunDir], str]] = {
    "prepare": lambda config, run: "tokens" if (run.tokens(config) / "meta.json").exists() else "nothing",
    "shard": lambda config, run: f"{_count(run.shards(config), '**/*')} files",
    "train": _train,
    "datastore": _datastore,
    "index-train": lambda _, run: "template" if IndexFolder(run.index).template_json.exists() else "nothing",
    "index-add": lambda _, run: f"{_count(IndexFolder(run.index).parts, 'part-*.json')} parts",
    "index-merge": lambda _, run: "merged" if IndexFolder(run.index).index_json.exists() else "nothing",
    "search": _search,
    "evaluate": _evaluate,
    "finetune": _finetune,
}
"""Progress mark of each stage: equal marks mean that nothing durable was added."""


def check_restart(
    stage: str, config: RunConfig, *, job: str, owner: str, restarts: int, max_same_start: int
) -> str | None:
    """Record that `job` asks to start again (for the `restarts`+1-th time); None, or why it must not.

    `owner` names who requeues, for the record.
    """
    run = RunDir.of(config)
    mark = MARKS[check_stage(stage)](config, run)
    path = run.root / "launch" / f"attempts-{stage}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = [line.mark for line in _read(path) if line.job == job]
    line = RestartLine(time=round(time.time(), 3), job=job, restarts=restarts, owner=owner, mark=mark)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line.line() + "\n")
    if len(before) >= max_same_start and set(before[-max_same_start:]) == {mark}:
        return (
            f"guard: not requeued: the last {max_same_start} restarts of {stage} in job {job} all began and ended at "
            f"{mark!r}. See the job's log for what stops it (a time limit too short for one step and one save?), then "
            "submit the same command again"
        )
    return None


def _read(path: Path) -> list[RestartLine]:
    """Lines of the record; a line that a kill cut short is passed over."""
    lines = []
    for number, text in enumerate(path.read_text("utf-8", "replace").splitlines() if path.exists() else [], 1):
        try:
            tree = json_of(text)
        except ValueError:
            continue
        lines.append(RestartLine.of(tree, Path(f"{path}:{number}")))
    return lines


def _count(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.glob(pattern))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the sbatch scripts. Exits 0, 1 (do not requeue) or 2 (usage)."""
    parser = argparse.ArgumentParser(prog="python -m launchers.guard", description="May this job be requeued?")
    parser.add_argument("--site", metavar="FILE", help="site file, for max_same_start")
    parser.add_argument("--max-same-start", type=int, metavar="N", help="instead of the site file's")
    parser.add_argument("stage", metavar="STAGE")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    try:
        limit = options.max_same_start or load_site(options.site)[0].max_same_start
        refusal = check_restart(
            options.stage,
            load_config(options.recipe, options.overrides),
            job=os.environ.get("SLURM_JOB_ID", "none"),
            owner="batch script",
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            max_same_start=limit,
        )
    except DistlmError as error:
        print(f"launchers.guard: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if refusal:
        print(refusal, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
