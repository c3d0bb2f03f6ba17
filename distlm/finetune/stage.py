"""The stage `distlm finetune`: one fine-tuning per seed on a task, scored on its dev set; medians over the seeds.

RUN_DIR/finetune/NAME/
  settings.json       what the results were made with
  seed-N/             metrics.jsonl, checkpoints while it runs (with finetune.keep_models also after), result.json
  seed-N/predictions/ for dev and test (predictions.py)
  results.json        all seeds that are done, medians, the majority baseline
"""

import gc
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from distlm.errors import DistlmError
from distlm.finetune.data import TaskData, open_task
from distlm.finetune.finished.state import RESULTS, SETTINGS, results_text
from distlm.finetune.job import FinetuneJob, train_config
from distlm.finetune.names import finetune_names
from distlm.finetune.plan import plan_finetune, plan_finetune_rows
from distlm.finetune.predictions import say_missing, write_all
from distlm.finetune.records import (
    FinetuneResults,
    FinetuneSettings,
    FinetuneState,
    MemoryChange,
    Scores,
    SeedResult,
    TaskMemoryUse,
)
from distlm.finetune.source import Source, checkpoint_fingerprint, open_source
from distlm.memory.config import MemoryConfig
from distlm.memory.values.exchange import Exchange
from distlm.models.plm.config import FinetuneConfig, PlmRun
from distlm.runtime import metrics
from distlm.runtime.files import require_free_disk
from distlm.runtime.lock import only_writer
from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.device import empty_cache
from distlm.runtime.ranks.rendezvous import join_group
from distlm.runtime.rundir import RunDir, code_version
from distlm.runtime.stage import Stage
from distlm.runtime.trackers.tracking import tracking
from distlm.training.loop import run_job

RESULT = "result.json"
_Use = dict[str, TaskMemoryUse]


@finetune_names()
def run_finetune(stage: Stage) -> dict[str, object]:
    """Fine-tune on each of finetune.tasks, or on finetune.task, with each of finetune.seeds; what is done is not done
    again.

    Returns the medians over the seeds of the dev metrics after the last epoch, `majority` (the baseline of the task's
    metric), seeds and seconds, on every rank; of several tasks as TASK/NAME. Raises Stopped (exit 75) after a
    checkpoint when a stop signal was agreed or finetune.max_updates_this_run is reached; DistlmError for faults in the
    settings, the data or the checkpoint, and when a loss stops being finite.
    """
    if len(stage.config.section(FinetuneConfig).each()) > 1:
        # The data of the last task, too, before the first one is trained on.
        rank0_first(stage.comm, lambda: plan_finetune(_plm_run(stage), stage.comm.size))
    return each_task(stage, _of_task)


def each_task(stage: Stage, run: Callable[[Stage, FinetuneConfig], dict[str, object]]) -> dict[str, object]:
    """`run` for each task that is asked for, in a stage whose section finetune is that task's alone.

    Gives what it returns; of several tasks as TASK/NAME.
    """
    found = {}
    for task in stage.config.section(FinetuneConfig).each():
        found[task.task] = run(replace(stage, config=replace(_plm_run(stage), finetune=task)), task)
    if len(found) == 1:
        return next(iter(found.values()))
    values = {f"{task}/{key}": value for task, one in found.items() for key, value in one.items() if key != "task"}
    return {"tasks": ",".join(found), **values}


def _plm_run(stage: Stage) -> PlmRun:
    assert isinstance(stage.config, PlmRun)
    return stage.config


def _of_task(stage: Stage, config: FinetuneConfig) -> dict[str, object]:
    began, comm = time.monotonic(), stage.comm
    run, folder = stage.run, stage.run.finetune(config.name)
    together(comm, lambda: plan_finetune_rows(config, comm.size))
    source = together(comm, lambda: open_source(config, run.root, run.shards(stage.config)))
    task = together(comm, lambda: open_task(config, source))
    rank0_first(comm, lambda: _claim(stage, config, folder, task, source))
    if task.left_out:
        say(f"finetune: {task.left_out} questions of train are left out: no answer at their answer_start", comm.rank)
    say_missing(task, config, comm.rank)
    join_group(stage.world)
    exchange = Exchange(stage.config.section(MemoryConfig).columns if source.memory else 1)
    for seed in config.seeds:
        _one_seed(stage, config, task, source, exchange, seed)
    results = rank0_first(comm, lambda: _combine(config, folder, task, source))
    seconds = time.monotonic() - began
    if comm.rank == 0:
        run.metrics.write("finetune", {metrics.STAGE_SECONDS: round(seconds, 3)})
    say(results_text(results), comm.rank)
    return {
        "task": config.task, **results.median, "majority": task.baseline[task.main],
        "seeds": ",".join(results.seeds), "seconds": round(seconds, 3),
    }  # fmt: skip


def _one_seed(
    stage: Stage, config: FinetuneConfig, task: TaskData, source: Source, exchange: Exchange, seed: int
) -> None:
    comm, folder = stage.comm, stage.run.finetune(config.name) / f"seed-{seed}"
    with only_writer(folder, comm, "fine-tuning"):
        if rank0_first(comm, lambda: _done(folder)):
            return
        began = time.monotonic()
        train = train_config(config, seed, len(task.train))
        train.kernels = stage.config.train.kernels
        own = replace(
            stage, name=f"finetune {config.name} seed {seed}", config=replace(stage.config, train=train),
            run=RunDir(folder),
        )  # fmt: skip
        job = together(comm, lambda: FinetuneJob(own, config, task, source, exchange))
        with tracking(stage.config, own.run.metrics if comm.rank == 0 else None, f"{stage.config.name} {own.name}"):
            state = run_job(own, job, lambda _: None)
        finished = rank0_first(comm, own.run.newest_checkpoint)
        outputs = job.outputs(finished)
        model = rank0_first(comm, lambda: checkpoint_fingerprint(finished, source.tokenizer_hash))
        rank0_first(comm, lambda: write_all(folder, task, outputs, model))
        if comm.rank == 0:
            _finish(stage, config, task, state, folder, round(time.monotonic() - began, 3))
        del job
        # The engine of one seed must be gone before the next one's is made.
        gc.collect()
        empty_cache()


def _done(folder: Path) -> bool:
    """Whether a seed is done; removes what a kill just before its end has left. Rank 0."""
    path = folder / RESULT
    if not path.exists():
        return False
    if not SeedResult.read(path).model_kept:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return True


def _finish(
    stage: Stage, config: FinetuneConfig, task: TaskData, state: FinetuneState, folder: Path, seconds: float
) -> None:
    epochs, train_loss = state.epochs, state.last["train_loss"]
    assert not isinstance(train_loss, str)
    found = SeedResult(
        seed=state.seed,
        updates=state.update,
        last=_scores(epochs[-1]),
        best_epoch=_scores(max(epochs, key=lambda epoch: epoch[task.main])),
        train_loss=train_loss,
        epochs=epochs,
        memory=_memory(state.memory_before, state.memory_after or {}),
        data_fingerprint=state.fingerprint,
        ranks=state.ranks,
        model_kept=config.keep_models,
        seconds=seconds,
    )
    found.write(folder / RESULT)
    stage.run.metrics.write(
        "finetune",
        {f"finetune/{config.name}/{name}": value for name, value in found.last.items()} | {"seed": found.seed},
    )
    if not config.keep_models:
        shutil.rmtree(folder / "checkpoints")


def _scores(epoch: Scores) -> Scores:
    return {name: value for name, value in epoch.items() if name not in ("update", "loss")}


def _memory(before: _Use | None, after: _Use) -> dict[str, MemoryChange]:
    return {layer: MemoryChange(before[layer], found) for layer, found in after.items()} if before else {}


def _claim(stage: Stage, config: FinetuneConfig, folder: Path, task: TaskData, source: Source) -> None:
    """Say what is needed and record the settings. DistlmError for results made with others."""
    plan = plan_finetune(_plm_run(stage), stage.comm.size)
    say(plan.line())
    now = FinetuneSettings(
        config=config, source=source.fingerprint, data=task.fingerprint, checkpoint=source.name.partition("=")[2]
    )
    path = folder / SETTINGS
    if path.exists():
        if different := FinetuneSettings.read(path).differences(now):
            raise DistlmError(
                f"{folder}: results of another fine-tuning ({'; '.join(different)}); remove the folder, give this one "
                "a finetune.name= of its own (one task at a time), or use the same settings, data and checkpoint"
            )
        return
    require_free_disk(folder, plan.disk_bytes, "fine-tuning")
    now.write(path)


def _combine(config: FinetuneConfig, folder: Path, task: TaskData, source: Source) -> FinetuneResults:
    """Write results.json from the seeds that are done."""
    files = sorted(folder.glob(f"seed-*/{RESULT}"), key=lambda path: int(path.parent.name.partition("-")[2]))
    seeds = {path.parent.name.partition("-")[2]: SeedResult.read(path) for path in files}
    results = FinetuneResults(
        name=config.name,
        task=config.task,
        memory_values=config.memory if source.memory else None,
        checkpoint=source.name.partition("=")[2],
        source=source.fingerprint,
        metric=task.main,
        median=_median([found.last for found in seeds.values()]),
        median_best_epoch=_median([found.best_epoch for found in seeds.values()]),
        majority=task.baseline,
        memory=_median_memory([found.memory for found in seeds.values()]),
        rows={"train": len(task.train), **{name: len(rows) for name, rows in task.dev.items()}},
        settings=config,
        seeds=seeds,
        code=code_version(),
    )
    results.write(folder / RESULTS)
    return results


def _median(seeds: Sequence[Scores]) -> Scores:
    return {name: statistics.median(found[name] for found in seeds) for name in seeds[0]}


def _median_memory(seeds: Sequence[dict[str, MemoryChange]]) -> dict[str, MemoryChange]:
    """Of every measure, those of labels, too."""

    def median(parts: list[Any]) -> Any:
        if isinstance(parts[0], dict):
            return {key: median([part[key] for part in parts]) for key in parts[0]}
        known = [part for part in parts if part is not None]
        return statistics.median(known) if known else None

    return msgspec.convert(median(msgspec.to_builtins(seeds)), dict[str, MemoryChange])
