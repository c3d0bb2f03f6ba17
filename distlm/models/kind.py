"""What a kind of model says about itself, in one object: the rest of the house asks this and nothing else.

A wing (`distlm/models/NAME/kind.py`), or another package, makes one `Kind` and calls it KIND. The module that does so
is read whenever a configuration is: it imports no torch, and what computes is imported in the methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from distlm.errors import DistlmError

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    import torch
    from torch import nn

    from distlm.config.schema import RunConfig
    from distlm.models.records import ModelCard
    from distlm.runtime.plan import StagePlan
    from distlm.runtime.rundir import RunDir
    from distlm.runtime.stage import Stage
    from distlm.training.job import Job

Refuse = Callable[[str, object, str], NoReturn]
"""refuse("section.key", value, what would do): raises UsageError that also says where the setting stands."""


class Description:
    """What model.json records of a model, as a dataclass: enough to build it."""

    KIND: ClassVar[str]
    """Name of its kind."""

    def recorded(self) -> dict[str, Any]:
        """What model.json holds of it. A field that is newer than files may be left out at its default, so that the
        fingerprints of models that are there stay what they are."""
        return asdict(self)  # type: ignore[call-overload]


class CausalDescription(Description):
    """That of a model that predicts the next word."""

    width: int
    """D of the hidden states."""
    max_positions: int
    """Longest sequence, in tokens."""

    @property
    def begins(self) -> bool:
        """Each block is given with Dictionary.BOS, the beginning of a text, in front: context that is never scored."""
        return False


@dataclass(frozen=True)
class Exchange:
    """A verb that brings models from another program, or takes them there: `distlm import NAME`, `export NAME`."""

    name: str
    """Word behind `import` or `export`."""
    summary: str
    """Its help."""
    arguments: Callable[[argparse.ArgumentParser], None]
    """Adds the arguments besides recipe and settings."""
    run: str
    """MODULE:FUNCTION of (configuration, options) → what was made, as names and figures. On one rank."""


def hugging_face(run: str) -> Exchange:
    """`distlm export hf`, which takes the same arguments for every kind; `run`: MODULE:FUNCTION."""
    summary = (
        "a model as a Hugging Face folder with weights, memory, code, tokenizer and card; onto the hub with --push"
    )
    return Exchange("hf", summary, _export_arguments, run)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder to write; it must not be there, or be empty")
    parser.add_argument("--push", metavar="USER/NAME", help="upload it to this repository of the hub, new or empty")
    parser.add_argument("--public", action="store_true", help="make the repository a public one; else it is private")
    parser.add_argument("--finetuned", metavar="NAME", help="the model that this fine-tuning (finetune.name) has kept")
    parser.add_argument("--seed", type=int, help="which of its seeds; may be left out where one was kept")


def schedule_may_grow(schedule: str) -> str:
    """Why training with this schedule may not go on longer than it was asked for; empty: it may."""
    if schedule in ("constant", "inverse_sqrt"):
        return ""
    return (
        f"the rate of train.schedule={schedule} is laid out over the updates that were asked for; start from these "
        "weights with another run_dir= and train.init_from="
    )


class ModelKind(ABC):
    """Models that a checkpoint can hold: how they are described and built."""

    name: str
    description: type[Description]
    """The class of model.json's "config"."""
    card: type[ModelCard] | None = None
    """The class of model.json, where it has more than that of other kinds."""

    def description_for(self, config: Mapping[str, Any]) -> type[Description]:
        """The class of model.json's "config" where that is `config`: `description`, or one that has more fields."""
        return self.description

    @abstractmethod
    def build(self, description: Any, vocabulary: int) -> nn.Module:
        """A fresh model over a dictionary of `vocabulary` words, from torch's global generator."""

    def undrawn(self, description: Any) -> Any:
        """The description of the same model without drawing or allocating weights that a file will give."""
        return description

    computes_buffers = False
    """Its buffers are computed when it is built, so that it is never built without memory for them."""

    def card_extras(self, description: Any, vocabulary: int) -> dict[str, int | str]:
        """Entries of model.json that only this kind has; fields of `card`."""
        return {}


class Kind(ModelKind):
    """A kind of model that a run trains: everything others ask of it.

    Kinds that predict the next word start from distlm.training.blocks.kind.BlocksKind, which answers most of it.
    """

    config: type[RunConfig]
    """Configuration of its runs: the sections that they read."""
    model_sections: tuple[str, ...]
    """Sections whose settings decide the checkpoint."""
    importers: tuple[Exchange, ...] = ()
    exporters: tuple[Exchange, ...] = ()
    causal = True
    """Predicts the next word, so that datastore, neighbours and cache are for it."""
    carries = False
    """Has a state that can be carried from block to block (knn.carry)."""

    # The configuration.

    @abstractmethod
    def stages(self, config: Any) -> tuple[str, ...]:
        """Verbs of `distlm run`, in order."""

    def fill(self, config: Any) -> None:
        """Set what was left empty and follows from other settings; before `check`."""
        return

    def check(self, config: Any, refuse: Refuse) -> None:
        """Call `refuse` for settings of this kind that have the right type and cannot work."""
        return

    def warnings(self, config: Any) -> list[str]:
        """What will run and is unlikely to be meant."""
        return []

    @abstractmethod
    def require_ranks(self, config: Any, ranks: int) -> None:
        """Raises UsageError when the work of training does not divide over so many ranks."""

    # The model. A description is one of this kind's.

    @abstractmethod
    def describe(self, config: Any) -> Description:
        """The model that a configuration asks for. Raises DistlmError when what it names cannot be read."""

    def require_tap(self, description: Any, tap: str, key: str) -> None:
        """Raises DistlmError, naming the setting `key` and the choices, when there is no hidden state `tap`."""
        raise DistlmError(f"{key}={tap!r}: a {self.name} has no hidden states to store")

    def inner_floats(self, description: Any) -> int:
        """Numbers per token that a forward pass holds of its widest layer, besides a handful of width D."""
        raise DistlmError(f"a {self.name} has no hidden states to store")

    def forward_flops(self, description: Any, tap: str, length: int) -> float:
        """FLOP per token of a forward pass to the tap over sequences of `length` tokens."""
        raise DistlmError(f"a {self.name} has no hidden states to store")

    def assumed_words(self, config: Any) -> int:
        """Size of the dictionary that plans assume before there are token files."""
        return int(config.data.max_words) or 40_000

    @abstractmethod
    def load(self, config: Any, run: RunDir, device: torch.device | str) -> tuple[nn.Module, Path]:
        """The model of a run in eval mode, fp32 on `device`, and its checkpoint: the one that later stages read.

        Raises DistlmError when there is none, or its files are damaged.
        """

    # Training and evaluation.

    @abstractmethod
    def plan(self, config: Any, ranks: int) -> StagePlan:
        """Needs of `distlm train` on so many ranks."""

    @abstractmethod
    def job(self, stage: Stage) -> Job:
        """Opens what `distlm train` needs. Raises DistlmError. Local."""

    def in_small(self, config: Any, share: float) -> dict[str, object] | None:
        """Settings, key → value, with which training does about this share of its work (at least a few updates) and
        starts from fresh weights, so that it can be timed; None: this kind cannot be tried in small."""
        return None

    def imports(self, config: Any) -> bool:
        """`distlm train` takes the model of another program as it is, and trains nothing."""
        return False

    def take(self, stage: Stage) -> dict[str, object]:
        """`distlm train` of a kind that `imports`: writes the checkpoint. What was made, as names and figures.
        Collective."""
        raise DistlmError(f"a {self.name} is not imported by `distlm train`")

    def may_grow(self, before: Mapping[str, Any], config: Any, key: str) -> str:
        """Why the length `key` of a training may not grow now; empty: it may, and gives what asking for it at first
        would have given. `before`: section → setting → value of the training that there is."""
        return "" if key != "train.updates" else schedule_may_grow(config.train.schedule)

    def finished(self, config: Any, run: RunDir) -> bool:
        """Whether the training is finished in this run directory."""
        return run.checkpoint(config.train.updates) in run.complete_checkpoints()

    @abstractmethod
    def plan_evaluate(self, config: Any, ranks: int) -> StagePlan:
        """Needs of `distlm evaluate`."""

    @abstractmethod
    def evaluate(self, stage: Stage) -> dict[str, float]:
        """`distlm evaluate`: writes RUN/lm.json; name of a text → perplexity. Collective."""

    @abstractmethod
    def evaluated(self, config: Any, run: RunDir) -> bool:
        """Whether RUN/lm.json is there and of the present checkpoint and texts."""
