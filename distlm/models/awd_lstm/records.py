"""What the training of an AWD-LSTM keeps in a checkpoint besides what every training does."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, Self

from msgspec import UNSET, UnsetType, field

from distlm.errors import DistlmError
from distlm.models.awd_lstm.config import AwdConfig, LstmConfig
from distlm.models.records import ModelCard
from distlm.runtime.records import Part
from distlm.training.records import TrainState

_SAME = {"awd.micro_batch"}
"""May change from start to start: it cuts the work, not its result."""
_LENGTHS = {"awd.epochs", "awd.finetune_epochs"}
"""May grow; the run directory refuses what may not (Kind.may_grow)."""
_SETTINGS = {
    f"{section}.{each.name}"
    for section, kind in (("lstm", LstmConfig), ("awd", AwdConfig))
    for each in fields(kind)
} - _SAME  # fmt: skip


class LstmCard(ModelCard, kw_only=True):
    """That of an AWD-LSTM."""

    FILE = "RUN/checkpoints/step-NNNNNNNN/model.json (awd_lstm)"

    rows: int | UnsetType = UNSET
    """Rows of the embedding: the words without those that never occur in text."""
    first_id: int | UnsetType = UNSET
    """Which word the first row is."""


class Judgement(Part):
    """What a validation decided."""

    epoch: int
    """Its epoch, counted from 1."""
    phase: str
    """The phase that it was in."""
    loss: float
    """Validation loss in nats per token."""
    rule: str
    """awd.trigger."""
    least: float | None
    """The loss that it was compared with; null: too few before it."""
    fired: bool
    """Whether the trigger fired."""


class EpochSums(Part):
    """Sums over the updates of the present epoch."""

    number: int = 1
    """Which epoch, counted from 1."""
    ce: float = 0.0
    """Cross entropy of its tokens, in nats."""
    tokens: int = 0
    """Tokens."""
    seconds: float = 0.0
    """Seconds of its updates, without validation and saving."""


class LstmState(TrainState, kw_only=True):
    """That of an AWD-LSTM: also its phase, and the settings that decide its data and phases."""

    FILE = "RUN/checkpoints/step-NNNNNNNN/state.json (awd_lstm)"

    lstm: LstmConfig
    """Section lstm; in the file each setting is a key of its own, lstm.NAME."""
    awd: AwdConfig
    """Section awd without micro_batch, which may change; likewise awd.NAME."""
    phase: Literal["sgd", "asgd", "finetune"] = "sgd"
    """Plain SGD, averaging, or fine-tuning."""
    halvings: int = 0
    """How often the rate was halved."""
    losses: list[float] = field(default_factory=list)
    """Validation losses that the trigger compares, in nats per token."""
    log: list[Judgement] = field(default_factory=list)
    """Every validation."""
    finished: bool = False
    """The training is over."""
    epoch: EpochSums = field(default_factory=EpochSums)
    """The present epoch."""

    @property
    def stopped(self) -> bool:
        """Fine-tuning was ended by the trigger: more epochs would not go on."""
        return self.phase == "finetune" and bool(self.log) and self.log[-1].phase == "finetune" and self.log[-1].fired

    @classmethod
    def of(cls, tree: Any, path: Path) -> Self:
        if isinstance(tree, dict):
            settings = {name: value for name, value in tree.items() if "." in name}
            if unknown := settings.keys() - _SETTINGS:
                raise DistlmError(
                    f"{path}: not a valid {cls.WHAT}: Object contains unknown field `{min(unknown)}`; {cls.MEND}"
                )
            tree = {name: value for name, value in tree.items() if name not in settings}
            tree["lstm"], tree["awd"] = (
                {name.partition(".")[2]: value for name, value in settings.items() if name.startswith(f"{section}.")}
                for section in ("lstm", "awd")
            )
        return super().of(tree, path)

    def tree(self) -> dict[str, Any]:
        rest = super().tree()
        del rest["lstm"], rest["awd"]
        return rest | self._settings()

    def identity(self) -> dict[str, object]:
        return super().identity() | {name: value for name, value in self._settings().items() if name not in _LENGTHS}

    def _settings(self) -> dict[str, object]:
        """By their names on the command line."""
        sections = {"lstm": asdict(self.lstm), "awd": asdict(self.awd)}
        found = {f"{section}.{name}": value for section, tree in sections.items() for name, value in tree.items()}
        return {name: value for name, value in found.items() if name in _SETTINGS}
