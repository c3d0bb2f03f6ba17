"""What fine-tuning will need: updates, rows, disk, memory, time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distlm.finetune.description import TaskModelConfig
from distlm.finetune.names import finetune_names
from distlm.finetune.tasks.glue import TASKS, read_glue
from distlm.finetune.tasks.squad import read_squad, read_squad_test
from distlm.finetune.tasks.unlabelled import read_glue_tests
from distlm.memory.of_model import layers_and_values
from distlm.models.card import CARD, model_of_card, read_model_card
from distlm.models.described import parameter_count
from distlm.models.io import card_parameters
from distlm.models.plm.config import FinetuneConfig, PlmRun
from distlm.models.plm.description import PlmModel
from distlm.models.plm.plan import activation_bytes, plm_of
from distlm.models.plm.sizes import BackboneSizes, backbone_sizes
from distlm.runtime.plan import StagePlan, rank_flops
from distlm.runtime.rundir import RunDir
from distlm.training.dsconfig import described, load_ds_config
from distlm.training.memory_need import states_memory, training_peak
from distlm.training.microbatch import MicroBatchPlan, cut_rows


@dataclass(frozen=True)
class ModelSizes:
    """Of a masked language model that is fine-tuned."""

    backbone: BackboneSizes
    parameters: int
    values: int
    """Numbers in the values of all memories."""


_BASE = ModelSizes(BackboneSizes(12, 768, 12, 3072, 512, 0.1), 110_000_000, 0)
"""What is assumed where there is no model yet: BERT-base."""


def plan_finetune_rows(config: FinetuneConfig, ranks: int) -> MicroBatchPlan:
    """The cut of `finetune.*`; see cut_rows. `config` has no defaults left."""
    rows, micro = ("finetune.rows_per_update", config.rows_per_update), ("finetune.micro_rows", config.micro_rows)
    return cut_rows(rows, micro, ranks, ": a")


@finetune_names()
def plan_finetune(config: PlmRun, ranks: int) -> StagePlan:
    """Needs of `distlm finetune` at a rank count.

    Time is an upper bound: all rows as long as the longest allowed, 6 FLOP per parameter and token in training and 2
    in scoring, on this machine's CPU. Raises DistlmError for a batch that does not divide and for missing data.
    """
    return of_tasks([_plan_of_task(config, one, ranks) for one in config.finetune.each()])


def of_tasks(plans: Sequence[StagePlan]) -> StagePlan:
    """The plan of several tasks, one after the other."""
    if len(plans) == 1:
        return plans[0]
    seconds = [plan.seconds for plan in plans if plan.seconds is not None]
    return StagePlan(
        plans[0].stage,
        "; ".join(plan.work for plan in plans),
        sum(plan.disk_bytes for plan in plans),
        max(plan.memory_bytes for plan in plans),
        sum(seconds) if len(seconds) == len(plans) else None,
        list(dict.fromkeys(note for plan in plans for note in plan.notes)),
        device_bytes=max(plan.device_bytes for plan in plans),
        host_bytes=max(plan.host_bytes for plan in plans),
    )


def _plan_of_task(config: PlmRun, settings: FinetuneConfig, ranks: int) -> StagePlan:
    micro = plan_finetune_rows(settings, ranks)
    deepspeed = load_ds_config(settings.deepspeed)
    train, dev, test = count_rows(settings)
    named = bool(settings.checkpoint)
    if named or RunDir.of(config).complete_checkpoints():
        model, notes = model_sizes(Path(settings.checkpoint if named else config.run_dir), named)
    else:
        model, notes = _sizes_to_come(config)
    parameters, values = model.parameters, model.values
    updates = -(-train * settings.epochs // settings.rows_per_update)
    rows = settings.epochs * (6 * train + 2 * dev) + 2 * test
    seconds = (
        settings.length * len(settings.seeds) * rows * parameters / (rank_flops(config.launch.threads, ranks) * ranks)
    )
    moments = 3 if settings.memory == "updated" else 1
    checkpoint = 12 * parameters + 4 * moments * values
    kept = len(settings.seeds) if settings.keep_models else 0
    # The word embeddings, about a quarter of a BERT-base, are the largest tensor.
    states = states_memory(parameters, parameters // 4, 2, settings.precision, deepspeed, ranks)
    table = 4 * moments * values // max(config.memory.columns or ranks, 1)
    plm = model.backbone if settings.dropout < 0 else replace(model.backbone, attention_dropout=settings.dropout)
    activations = activation_bytes(plm, micro.micro_blocks * settings.length, settings.length)
    peak = training_peak(states, table, activations)
    tested = f", {test} of test" if test else ""
    return StagePlan(
        "finetune",
        f"{settings.task}: {len(settings.seeds)} seeds, each {updates} updates of {settings.rows_per_update} rows "
        f"({settings.epochs} epochs of {train}; {dev} rows of dev{tested}), "
        f"memory {settings.memory}, {described(deepspeed)}",
        checkpoint * (kept + 2),
        peak.memory,
        seconds,
        notes,
        device_bytes=peak.device,
        host_bytes=peak.host,
    )


def count_rows(settings: FinetuneConfig, train: bool = True) -> tuple[int, int, int]:
    """Examples of train (without `train` 0), dev and test. Raises DistlmError for missing or wrong data."""
    if settings.task == "SQuAD":
        asked = read_squad(settings, train)
        return len(asked.get("train", ())), len(asked["dev"]), len(read_squad_test(settings) or ())
    task = TASKS[settings.task]
    splits, tests = read_glue(task, settings, train), read_glue_tests(task, settings)
    dev = sum(len(splits[name]) for name in task.dev)
    return len(splits.get("train", ())), dev, sum(len(found.ids) for found in tests.values())


def _sizes_to_come(config: PlmRun) -> tuple[ModelSizes, list[str]]:
    """The same as model_sizes of the model that this configuration trains."""
    model, vocabulary = plm_of(config), config.shards.vocabulary_size
    plm = backbone_sizes(model.backbone)
    values = layers_and_values(model.memory, plm.width)[1]
    sizes = ModelSizes(plm, parameter_count(model, vocabulary), values)
    return sizes, ["no checkpoint yet: the model of this configuration"]


def model_sizes(place: Path, named: bool) -> tuple[ModelSizes, list[str]]:
    """Sizes and notes, of a run directory or of a checkpoint that was named."""
    found = RunDir(place).complete_checkpoints()
    folder = found[-1] if found else place
    if not (folder / CARD).exists():
        what = "not a checkpoint of distlm" if named else "no checkpoint yet"
        return _BASE, [f"{what}: {_BASE.parameters // 1_000_000} M parameters are assumed"]
    card = read_model_card(folder)
    model = model_of_card(card)
    if not isinstance(model, PlmModel | TaskModelConfig):
        return _BASE, [f"{folder}: a {card.kind}, not a masked language model"]
    plm = backbone_sizes(model.backbone)
    return ModelSizes(plm, card_parameters(card), layers_and_values(model.memory, plm.width)[1]), []
