"""Ends a loop of restarts that bring nothing, and those of a cancelled job: asked before a job is queued again.

Every call adds a line to RUN/launch/attempts-STAGE.jsonl with the progress mark of the next start: what is durable in
the run directory at that moment. A mark that stands still over `max_same_start` (site file) restarts ends the loop.
"""

import time
from collections.abc import Callable
from pathlib import Path

from distlm.config.schema import RunConfig
from distlm.datastore.manifest import SIDECARS, is_complete
from distlm.datastore.records import UnitsFile
from distlm.datastore.unfinished.files import UNITS
from distlm.index.layout import IndexFolder
from distlm.index.records import CODES, CodesRecord
from distlm.runtime.files import json_of
from distlm.runtime.rundir import RunDir
from launchers.jobs import submissions, was_cancelled
from launchers.records import RestartLine
from launchers.site import check_stage


def _train(_config: RunConfig, run: RunDir) -> str:
    complete = run.complete_checkpoints()
    return complete[-1].name if complete else "no checkpoint"


def _datastore(_config: RunConfig, run: RunDir) -> str:
    if is_complete(run.datastore):
        return "complete"
    return f"{_count(run.datastore, SIDECARS)} shards{_units(run.datastore, UNITS, UnitsFile)}"


def _search(config: RunConfig, run: RunDir) -> str:
    # Kinds apart: finished units replace found ones, so a plain sum could stand still while work goes on.
    kinds = ("found/unit-*", "rescore/*.npy", "unit-*", "manifest.json")
    counts = {
        split: [_count(run.neighbours(split), kind) for kind in kinds] + [_count(run.cache(split), "**/*")]
        for split in config.knn.splits
    }
    return ", ".join(f"{split} {'+'.join(map(str, found))}" for split, found in counts.items())


def _index_train(_config: RunConfig, run: RunDir) -> str:
    if IndexFolder(run.index).template_json.exists():
        return "template"
    # What k-means keeps after its iterations.
    return ", ".join(sorted(path.name for path in run.index.glob(".kmeans-*.npy"))) or "nothing"


def _index_add(_config: RunConfig, run: RunDir) -> str:
    parts = IndexFolder(run.index).parts
    return f"{_count(parts, 'part-*.json')} parts{_units(parts, CODES, CodesRecord)}"


def _evaluate(_config: RunConfig, run: RunDir) -> str:
    return "+".join(path.name for path in (run.tuned, run.results) if path.exists()) or "nothing"


def _finetune(_config: RunConfig, run: RunDir) -> str:
    seeds = run.root / "finetune"
    steps = sorted(step.name for seed in seeds.glob("*/seed-*") for step in RunDir(seed).complete_checkpoints())
    return f"{_count(seeds, '*/seed-*/result.json')} seeds, {', '.join(steps) or 'no checkpoint'}"


MARKS: dict[str, Callable[[RunConfig, RunDir], str]] = {
    "prepare": lambda config, run: "tokens" if (run.tokens(config) / "meta.json").exists() else "nothing",
    "shard": lambda config, run: f"{_count(run.shards(config), '**/*')} files",
    "train": _train,
    "datastore": _datastore,
    "index-train": _index_train,
    "index-add": _index_add,
    "index-merge": lambda _, run: "merged" if IndexFolder(run.index).index_json.exists() else "nothing",
    "search": _search,
    "evaluate": _evaluate,
    "finetune": _finetune,
}
"""Progress mark of each stage: equal marks mean that nothing durable was added."""


def check_restart(
    stage: str, config: RunConfig, *, job: str, owner: str, restarts: int, max_same_start: int, preempted: bool = False
) -> str | None:
    """Record that `job` asks to start again (for the `restarts`+1-th time); None, or why it must not.

    `job`: as scontrol names it (`12`, or `12_3`). `owner` names who requeues, for the record.
    """
    run = RunDir.of(config)
    mark = MARKS[check_stage(stage)](config, run)
    if was_cancelled(run, job):
        return f"guard: not requeued: `distlm cancel` ended job {job}"
    path = attempts(run, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = [line.mark for line in restarts_of(path) if line.job == job]
    line = RestartLine(
        time=round(time.time(), 3), job=job, restarts=restarts, owner=owner, mark=mark, preempted=preempted
    )
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line.line() + "\n")
    if len(before) >= max_same_start and set(before[-max_same_start:]) == {mark}:
        return (
            f"guard: not requeued: the last {max_same_start} restarts of {stage} in job {job} all began and ended at "
            f"{mark!r}. See the job's log for what stops it (a time limit too short for one step and one save?), then "
            "submit the same command again"
        )
    return None


def attempts(run: RunDir, stage: str) -> Path:
    """The record of the restarts of a stage."""
    return run.root / "launch" / f"attempts-{stage}.jsonl"


def times_preempted(run: RunDir, stage: str, job: str) -> int:
    """How often `job`, or jobs whose successor it is, came back after a preemption."""
    times = sum(line.preempted for line in restarts_of(attempts(run, stage)) if line.job == job)
    before = next((each.follows for each in submissions(run) if each.job == job), "")
    return times + (1 + times_preempted(run, stage, before) if before else 0)


def restarts_of(path: Path) -> list[RestartLine]:
    """Lines of a record of restarts; a line that a kill cut short is passed over."""
    lines = []
    for number, text in enumerate(path.read_text("utf-8", "replace").splitlines() if path.exists() else [], 1):
        try:
            tree = json_of(text)
        except ValueError:
            continue
        lines.append(RestartLine.of(tree, Path(f"{path}:{number}")))
    return lines


def _units(folder: Path, pattern: str, kind: type[UnitsFile | CodesRecord]) -> str:
    """Units within unfinished shards."""
    records = [record for path in folder.glob(pattern) if (record := kind.peek(path)) is not None]
    done = sum(len(record.done) for record in records)
    return f", {done} units" if done else ""


def _count(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.glob(pattern))
