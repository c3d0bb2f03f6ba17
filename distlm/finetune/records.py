"""What a fine-tuning writes: the settings of its results, a result for each seed, and all of them together."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

from msgspec import UNSET, UnsetType, field

from distlm.errors import DistlmError
from distlm.memory.records import MemoryUse
from distlm.models.plm.config import FinetuneConfig
from distlm.models.records import Marker
from distlm.runtime.records import CodeVersion, Part, Record
from distlm.training.records import UpdatesState

Scores = dict[str, int | float]
"""Metric → value."""
_FREE = (
    "tasks", "seeds", "deepspeed", "save_every", "keep_models", "max_updates_this_run", "data_dir", "hub_name",
    "source", "checkpoint", "tokenizer",
)  # fmt: skip
DECIDING = tuple(each.name for each in fields(FinetuneConfig) if each.name not in _FREE)
"""Settings of the section finetune that results depend on; the others may differ between two starts that go on with
the same results."""


class FinetuneSettings(Record):
    """What a fine-tuning's results were made with."""

    FILE = "RUN/finetune/NAME/settings.json"
    WHAT = "settings of a fine-tuning"
    WRITER = "distlm finetune"
    READERS = ("distlm finetune",)

    config: FinetuneConfig
    """Settings of the section finetune that decide the results; in the file each is a key of its own."""
    source: str
    """Fingerprint of weights, memory and tokenizer that it starts from."""
    data: str
    """Fingerprint of the rows and labels."""
    checkpoint: str
    """Where the weights came from."""

    @classmethod
    def of(cls, tree: Any, path: Path) -> Self:
        if isinstance(tree, dict):
            tree = dict(tree)
            own = {name: tree.pop(name) for name in ("format", "source", "data", "checkpoint") if name in tree}
            if unknown := tree.keys() - set(DECIDING):
                raise DistlmError(
                    f"{path}: not a valid {cls.WHAT}: Object contains unknown field `{min(unknown)}`; {cls.MEND}"
                )
            # A setting that is newer than the results had its default value then.
            tree = {**own, "config": {**asdict(FinetuneConfig().with_defaults()), **tree}}
        return super().of(tree, path)

    def tree(self) -> dict[str, Any]:
        rest = super().tree()
        config = rest.pop("config")
        return {**{name: config[name] for name in DECIDING}, **rest}

    def differences(self, now: Self) -> list[str]:
        """`finetune.NAME: … there, … now` of each setting, source or data that is another."""
        pairs = {"source": (self.source, now.source), "data": (self.data, now.data)}
        others = [f"finetune.{name}: {a!r} there, {b!r} now" for name, (a, b) in pairs.items() if a != b]
        return [*self.setting_differences(now.config), *others]

    def setting_differences(self, now: FinetuneConfig) -> list[str]:
        """The same of the settings alone."""
        pairs = {name: (getattr(self.config, name), getattr(now, name)) for name in DECIDING}
        return [f"finetune.{name}: {a!r} there, {b!r} now" for name, (a, b) in pairs.items() if a != b]


class LabelsApart(Part):
    """How differently two labels' rows use a memory (Kim & Jung, figure 4); null: one of them does not use it."""

    kl: float | None
    """Divergence of the best reads, in nats."""
    iou: float | None
    """Intersection over union of the best reads."""


class TaskMemoryUse(MemoryUse, kw_only=True):
    """Use of the slots by (the first split of) dev."""

    labels: dict[str, LabelsApart] | UnsetType = UNSET
    """"B|A" → how B differs from A; absent in tasks without labels."""


class MemoryChange(Part):
    """Use of one memory before and after the fine-tuning."""

    before: TaskMemoryUse
    """With the source's weights."""
    after: TaskMemoryUse
    """After the last epoch."""


class SeedResult(Record):
    """What one seed's fine-tuning gave."""

    FILE = "RUN/finetune/NAME/seed-N/result.json"
    WHAT = "result of a seed"
    WRITER = "distlm finetune"
    READERS = ("distlm finetune",)

    seed: int
    """finetune.seeds: of the head's first weights, the order and the dropout."""
    updates: int
    """Updates done."""
    last: Scores
    """Metric → its value on dev after the last epoch."""
    best_epoch: Scores
    """The same after the epoch with the best value of the task's metric."""
    train_loss: float | None
    """Mean over the rows of the last logged updates, in nats (of a number its squared error)."""
    epochs: list[Scores]
    """Of each epoch: update, loss on dev (as train_loss), and every metric."""
    memory: dict[str, MemoryChange]
    """Layer → use of its memory; empty without memory."""
    data_fingerprint: str
    """Chain over the rows of all updates: equal for equal rows in equal order."""
    ranks: int
    """Ranks of the last start."""
    model_kept: bool
    """finetune.keep_models: its last checkpoint lies beside this file."""
    seconds: float
    """Seconds that the last start took."""


class PredictionFiles(Marker):
    """Predictions of one model for dev or test; written last."""

    NAME = "manifest.json"
    FILE = "RUN/finetune/NAME/seed-N/predictions/PART/manifest.json"
    WHAT = "list of prediction files"
    WRITER = "distlm finetune"
    READERS = ("distlm finetune --evaluate-only",)
    MEND = "remove the folder, and run `distlm finetune --evaluate-only`, which writes it again"

    task: str
    """finetune.task."""
    model: str
    """Fingerprint of weights, memory and tokenizer of the fine-tuned model."""
    data: str
    """Fingerprint of rows, labels and ids."""
    rows: dict[str, int]
    """Split → its predictions."""


class TaskEvaluation(Record):
    """A fine-tuned model's scores on dev, without training."""

    FILE = "RUN/finetune/NAME/seed-N/evaluation.json (of a model from elsewhere RUN/finetune/NAME/evaluation.json)"
    WHAT = "evaluation of a fine-tuned model"
    WRITER = "distlm finetune --evaluate-only"
    READERS = ("distlm finetune --evaluate-only",)

    task: str
    """finetune.task."""
    checkpoint: str
    """Where the model lies."""
    model: str
    """Fingerprint of its weights, memory and tokenizer."""
    data: str
    """Fingerprint of the rows and labels of dev."""
    metric: str
    """The task's metric."""
    scores: Scores
    """Metric → its value on dev."""
    loss: float
    """Mean over the rows of (the first split of) dev, in nats (of a number its squared error)."""
    majority: Scores
    """Metric → the best that a single answer for all of dev reaches; empty for SQuAD, where train decides that."""
    memory: dict[str, TaskMemoryUse]
    """Layer → use of its memory; empty without memory."""
    rows: dict[str, int]
    """Split of dev or test → rows."""
    settings: FinetuneConfig
    """The section finetune."""
    ranks: int
    """Ranks that did it."""
    code: CodeVersion
    """Which code wrote this file."""


class FinetuneState(UpdatesState, kw_only=True):
    """That of one seed's fine-tuning."""

    FILE = "RUN/finetune/NAME/seed-N/checkpoints/step-NNNNNNNN/state.json"
    WRITER = "distlm finetune"
    READERS = ("distlm finetune",)
    IDENTITY = (*UpdatesState.IDENTITY, "source")

    source: str
    """Fingerprint of weights, memory and tokenizer that it starts from."""
    epochs: list[Scores] = field(default_factory=list)
    """Of each epoch: update, loss on dev, and every metric."""
    memory_before: dict[str, TaskMemoryUse] | None = None
    """Layer → use of its memory with the source's weights; null without memory."""
    memory_after: dict[str, TaskMemoryUse] | UnsetType = UNSET
    """The same after the last epoch; absent until then."""


class FinetuneResults(Record):
    """All seeds of a fine-tuning that are done, and their medians."""

    FILE = "RUN/finetune/NAME/results.json"
    WHAT = "fine-tuning results"
    WRITER = "distlm finetune"
    READERS = ("distlm run", "distlm report", "distlm reproduce pkm-plm")

    name: str
    """finetune.name, or what stands for it."""
    task: str
    """finetune.task."""
    memory_values: str | None
    """updated or frozen; null: a model without memory."""
    checkpoint: str
    """What it started from."""
    source: str
    """Fingerprint of that."""
    metric: str
    """The task's metric, by which epochs are compared."""
    median: Scores
    """Metric → median over the seeds of `last`."""
    median_best_epoch: Scores
    """Metric → median over the seeds of `best_epoch`."""
    majority: Scores
    """Metric → the best that a single answer for all of dev reaches."""
    memory: dict[str, MemoryChange]
    """Layer → medians over the seeds."""
    rows: dict[str, int]
    """Split → rows."""
    settings: FinetuneConfig
    """The section finetune of the latest start."""
    seeds: dict[str, SeedResult]
    """Seed → its result.json."""
    code: CodeVersion
    """Which code wrote this file."""
