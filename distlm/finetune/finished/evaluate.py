"""`distlm finetune --evaluate-only`: scores and predictions of fine-tuned models that are finished.

Those that a fine-tuning of this finetune.name has kept (finetune.keep_models), each into its seed's folder; where there
was none, the one that finetune.checkpoint names, into RUN_DIR/finetune/NAME:
  evaluation.json     scores on dev
  predictions/        for dev and test (predictions.py)
"""

import gc
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from distlm.errors import DistlmError
from distlm.finetune.data import TaskData, open_task
from distlm.finetune.finished.state import SETTINGS
from distlm.finetune.job import EvaluationJob, train_config
from distlm.finetune.names import finetune_names
from distlm.finetune.plan import count_rows, model_sizes, of_tasks, plan_finetune_rows
from distlm.finetune.predictions import predicted_parts, say_missing, write_all
from distlm.finetune.records import FinetuneSettings, Scores, SeedResult, TaskEvaluation
from distlm.finetune.score import TaskValidation
from distlm.finetune.source import Source, open_finetuned
from distlm.finetune.stage import RESULT, each_task
from distlm.memory.config import MemoryConfig
from distlm.memory.values.exchange import Exchange
from distlm.models.plm.config import FinetuneConfig, PlmRun
from distlm.runtime.lock import only_writer
from distlm.runtime.plan import StagePlan, rank_flops
from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.device import empty_cache
from distlm.runtime.ranks.rendezvous import join_group
from distlm.runtime.rundir import RunDir, code_version
from distlm.runtime.stage import Stage

EVALUATION = "evaluation.json"


class Finished(NamedTuple):
    """A fine-tuned model, and where what is found of it goes."""

    model: Path
    place: Path
    seed: int | None
    """None: not a model of this run's."""


@finetune_names()
def run_evaluate_finetuned(stage: Stage) -> dict[str, object]:
    """Score each model of each task on dev, and write predictions for dev and test.

    Returns the medians over the models of the dev metrics, and seconds, on every rank; of several tasks as TASK/NAME.
    Raises DistlmError for models that are not there, of another task or with other settings, and for predictions of
    another model or other data.
    """
    return each_task(stage, _of_task)


def _of_task(stage: Stage, config: FinetuneConfig) -> dict[str, object]:
    began, comm = time.monotonic(), stage.comm
    together(comm, lambda: plan_finetune_rows(config, comm.size))
    models = rank0_first(comm, lambda: finished_models(config, stage.run.finetune(config.name)))
    join_group(stage.world)
    scores = []
    for number, model in enumerate(models):
        if number:
            stage.stop.check(comm, "the evaluation of one model")
        scores.append(_evaluate(stage, config, model, first=number == 0))
    median = {name: statistics.median(found[name] for found in scores) for name in scores[0]}
    seeds = {"seeds": ",".join(str(model.seed) for model in models)} if models[0].seed is not None else {}
    return {"task": config.task, **median, **seeds, "seconds": round(time.monotonic() - began, 3)}


def finished_models(config: FinetuneConfig, folder: Path) -> list[Finished]:
    """What there is to evaluate; `folder`: RUN_DIR/finetune/NAME. Raises DistlmError when there is nothing."""
    if not (folder / SETTINGS).exists():
        if not config.checkpoint:
            raise DistlmError(
                f"{folder}: no fine-tuning there; give the finetune.task and finetune.name of one that was done with "
                "finetune.keep_models=true, or name a fine-tuned model with finetune.checkpoint="
            )
        return [Finished(Path(config.checkpoint), folder, None)]
    if different := FinetuneSettings.read(folder / SETTINGS).setting_differences(config):
        raise DistlmError(
            f"{folder}: models of another fine-tuning ({'; '.join(different)}); use the same settings, or give a "
            f"finetune.name= of its own and finetune.checkpoint={folder}/seed-N"
        )
    found = []
    for seed in config.seeds:
        place = folder / f"seed-{seed}"
        if not (place / RESULT).exists() or not RunDir(place).complete_checkpoints():
            why = "its model was not kept" if (place / RESULT).exists() else "not finished"
            raise DistlmError(
                f"{place}: {why}; name the seeds that are there with finetune.seeds=, or fine-tune with "
                "finetune.keep_models=true under a finetune.name= of its own"
            )
        found.append(Finished(place, place, seed))
    return found


def plan_evaluate_finetuned(config: PlmRun, ranks: int) -> StagePlan:
    """Needs of `distlm finetune --evaluate-only`. Raises DistlmError for missing models and data."""
    return of_tasks([_plan_of_task(config, one, ranks) for one in config.finetune.each()])


def _plan_of_task(config: PlmRun, settings: FinetuneConfig, ranks: int) -> StagePlan:
    plan_finetune_rows(settings, ranks)
    models = finished_models(settings, RunDir.of(config).finetune(settings.name))
    _, dev, test = count_rows(settings, train=False)
    model, notes = model_sizes(models[0].model, named=True)
    flops = 2 * settings.length * len(models) * (dev + test) * model.parameters
    seconds = flops / (rank_flops(config.launch.threads, ranks) * ranks)
    memory = 16 * model.parameters + 4 * model.values // max(config.memory.columns or ranks, 1)
    work = f"{settings.task}: {len(models)} fine-tuned models, {dev} rows of dev and {test} of test"
    return StagePlan("finetune", work, 0, memory, seconds, notes)


def _evaluate(stage: Stage, config: FinetuneConfig, model: Finished, first: bool) -> Scores:
    comm = stage.comm
    own = replace(config, checkpoint=str(model.model))
    source = together(comm, lambda: open_finetuned(own, comm.rank))
    task = together(comm, lambda: open_task(own, source, train=False))
    if first:
        say_missing(task, config, comm.rank)
    with only_writer(model.place, comm, "evaluating a fine-tuned model"):
        kept = rank0_first(comm, lambda: _check(source, task, model.place))
        title = f"finetune {config.name}" + ("" if model.seed is None else f" seed {model.seed}")
        train = train_config(own, model.seed or 1, 0)
        part = replace(
            stage, name=title, config=replace(stage.config, train=train), run=RunDir(model.place)
        )  # fmt: skip
        exchange = Exchange(stage.config.section(MemoryConfig).columns if source.memory else 1)
        job = together(comm, lambda: EvaluationJob(part, own, task, source, exchange))
        job.begin(None)
        found = job.score()
        outputs = {**found.outputs, **job.run_tests()}
        say(f"{title}: {found.text}", comm.rank)
        rank0_first(comm, lambda: _write(own, model, task, source, found, comm.size))
        rank0_first(comm, lambda: write_all(model.place, task, outputs, source.fingerprint, kept))
        if comm.rank == 0:
            _compare(model, title, found.scores)
    # The engine of one model must be gone before the next one's is made.
    del job
    gc.collect()
    empty_cache()
    return dict(found.scores)


def _check(source: Source, task: TaskData, place: Path) -> frozenset[str]:
    """Whether model, task and what was found before belong together; the predictions that are there already."""
    model = source.task
    assert model is not None
    if (model.head, model.labels) != (task.head, task.outputs) or model.task not in ("", task.name):
        raise DistlmError(
            f"{source.name}: fine-tuned on {model.task or 'another task'} ({model.labels} outputs), not on "
            f"finetune.task={task.name} ({task.outputs}); set finetune.task to that of the model"
        )
    path = place / EVALUATION
    if path.exists():
        before, data = TaskEvaluation.read(path), task.part_fingerprint("dev")
        for name, old, new in (("model", before.model, source.fingerprint), ("data", before.data, data)):
            if old != new:
                raise DistlmError(
                    f"{path}: of another evaluation ({name} {old} there, {new} now); remove it, or give this one a "
                    "finetune.name= of its own, with finetune.checkpoint= the model"
                )
    return predicted_parts(place, task, source.fingerprint)


def _write(
    config: FinetuneConfig, model: Finished, task: TaskData, source: Source, found: TaskValidation, ranks: int
) -> None:
    TaskEvaluation(
        task=task.name,
        checkpoint=str(model.model),
        model=source.fingerprint,
        data=task.part_fingerprint("dev"),
        metric=task.main,
        scores=dict(found.scores),
        loss=found.loss,
        majority=task.baseline,
        memory=found.memory,
        rows={name: len(task.ids[name]) for name in task.ids},
        settings=config,
        ranks=ranks,
        code=code_version(),
    ).write(model.place / EVALUATION)


def _compare(model: Finished, title: str, scores: Scores) -> None:
    """Say whether they are those that the training found."""
    if model.seed is None:
        return
    before = SeedResult.read(model.place / RESULT)
    if other := [
        f"{name} {scores[name]} now, {value} then" for name, value in before.last.items() if scores[name] != value
    ]:
        say(
            f"{title}: not the scores of {RESULT}: {'; '.join(other)}; that had {before.ranks} ranks, and maybe other "
            "examples"
        )
    else:
        say(f"{title}: the same scores as in {RESULT}")
