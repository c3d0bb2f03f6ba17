"""What a kind of model brings to the training loop: its data and how it is cut, its updates, its validation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor, nn

from distlm.config.schema import TrainConfig
from distlm.config.training import UpdatesConfig
from distlm.data.tokens import TokenFiles
from distlm.models.described import build_model, model_of
from distlm.models.io import read_weights
from distlm.models.kind import Description
from distlm.runtime import metrics
from distlm.runtime.checked import Written
from distlm.runtime.ranks.collective import together
from distlm.runtime.ranks.device import default_device
from distlm.runtime.stage import Stage
from distlm.training.checkpoint import Resume, model_to_train, restore
from distlm.training.dsconfig import DeepSpeedConfig, offloaded, zero_stage
from distlm.training.engine import Engine
from distlm.training.kernels.choose import choose
from distlm.training.kernels.problem import Problem
from distlm.training.microbatch import MicroBatchPlan
from distlm.training.objective import Objective
from distlm.training.records import S, fresh_state
from distlm.training.start.init_from import source_checkpoint, take_weights
from distlm.training.update import Outcome
from distlm.training.validate import Validation


class Text(NamedTuple):
    """What identifies the text that a model is trained on."""

    fingerprint: str
    dictionary: str
    """Hash of the dictionary or tokenizer."""
    vocabulary: int
    folder: Path = Path()
    """Of `files`."""
    files: Sequence[Written] = ()
    """As they were written, where no reader compares what it reads with checksums."""

    @staticmethod
    def of(tokens: TokenFiles) -> "Text":
        """Of token files."""
        read = tokens.written("train", "valid")
        return Text(tokens.fingerprint, tokens.dictionary.hash, len(tokens.dictionary), tokens.folder, read)


class Kept(NamedTuple):
    """What a checkpoint holds besides weights, optimizer and `state`."""

    average: str | None = None
    """Optimizer state that is the model to be used; None: the weights are."""
    hidden: Mapping[str, Tensor] = {}
    """Hidden states; on rank 0."""
    write: Callable[[Path], object] | None = None
    """Writes this rank's further files into the folder of the checkpoint. Local."""


class Job(ABC, Generic[S]):
    """One training run on this rank. Opened first, which checks the settings; `begin` then makes the engine.

    `state`, a TrainState of the kind's own, is the loop's, goes into state.json, and is the same on every rank.
    """

    train: TrainConfig
    model: Description
    tap: str | None = None
    """The hidden state that a datastore will hold, where there is one."""
    updates: int
    """Updates in all; where training may end sooner, the most there can be."""
    engine: Engine
    parameters: int
    kernels: list[str]
    """Operations that kernels in Triton do; from `begin` on."""
    unit = metrics.TOKENS_PER_S
    """Name of the rate: what the loss is a mean over, per second."""
    may_offload = True
    """Whether the optimizer's states may be in the host's memory."""
    keeps_best = True
    """Whether the checkpoint with the lowest validation loss is made and kept."""

    rows_at_once, files_of_deepspeed = "train.micro_blocks", "train.deepspeed"
    """The settings of the rows of one forward pass, and of DeepSpeed's file, which lower the memory of a rank."""

    CALMER = "lower train.lr, raise train.warmup_updates or lower train.clip_norm, and start with another run_dir="
    """What helps where the training diverges. The settings are none that may change under a checkpoint."""

    began_at: float = 0.0
    """When the first update of this start began, in seconds of time.monotonic; 0: there was none."""

    def __init__(
        self, stage: Stage, text: Text, micro: MicroBatchPlan, deepspeed: DeepSpeedConfig,
        model: Description | None = None,
    ) -> None:  # fmt: skip
        """`model`: None: the configuration's."""
        self.stage, self.train, self.comm = stage, stage.config.train, stage.comm
        self.text, self.micro, self.deepspeed = text, micro, deepspeed
        self.model = model or model_of(stage.config)

    @abstractmethod
    def fresh_state(self) -> S:
        """The state at update 0: `state_of` the kind's class with what only it has."""

    def state_of(self, kind: type[S], **own: Any) -> S:
        """`kind` at update 0 of this run; `own`: its fields that not every kind has."""
        text, ranks = self.text, self.comm.size
        return fresh_state(kind, text.fingerprint, text.dictionary, self.train, ranks, self.tap, **own)

    def begin(self, resume: Resume[S] | None) -> None:
        """A fresh engine, or the checkpoint's. Collective."""
        device = default_device()
        if resume is None:
            torch.manual_seed(self.train.seed)
            model = self.fresh_model()
            if self.train.init_from:
                together(self.comm, lambda: self.start_from(model, source_checkpoint(self.train.init_from)))
        else:
            model = together(self.comm, lambda: self.saved_model(resume))
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        kept = None if resume is None else resume.state.kernels or ()
        problem = Problem.of(model, self.text.vocabulary, self.train.precision)
        self.kernels = choose(self.train.kernels, kept, problem, device, self.comm)
        # DeepSpeed replaces the tensors by half-precision copies; these keep the fp32 values for `restore`.
        weights = {} if resume is None else {name: parameter.data for name, parameter in model.named_parameters()}
        objective = self.objective(model)
        self.engine = Engine(objective, self.optimizer(objective), self.deepspeed, self.stage.world, device)
        if resume is not None:
            restore(self.engine, resume, weights)
            together(self.comm, lambda: self.resumed(resume))

    @property
    def highest_stage(self) -> int:
        """The highest ZeRO stage that can train it."""
        return 3

    def calmer(self) -> str:
        """What helps where this training diverges."""
        return self.CALMER

    def needs_less(self) -> str:
        """What to set when a rank's memory does not do, and what changes then."""
        found = []
        # A pass of one row on each rank is the least there is.
        if self.micro.micro_blocks > 1:
            found.append(f"set {self.rows_at_once} below {self.rows_now} (rows of one forward pass{self.fixed_rows()})")
        stage, away = max(zero_stage(self.deepspeed), 1), offloaded(self.deepspeed).optimizer
        if stage < self.highest_stage and self.comm.size > 1:
            shared = "the weights, too," if stage == 2 else "more of the training state"
            name = f"zero{stage + 1}{'-offload' if away else ''}"
            found.append(f"take {self.files_of_deepspeed}={name}, which shares {shared} out among the ranks")
        if self.may_offload and not away:
            kept = "weights and optimizer states" if stage == 3 else "optimizer states"
            found.append(f"take {self.files_of_deepspeed}=zero{stage}-offload, which keeps {kept} in the host's memory")
        said = ", or ".join(found) or "take a device with more memory"
        return said[0].upper() + said[1:]

    @property
    def rows_now(self) -> int:
        """What `rows_at_once` comes to, whatever it stands for where it is 0."""
        assert isinstance(self.train, UpdatesConfig)
        return self.train.micro_blocks

    def fixed_rows(self) -> str:
        """What holds the rows of one forward pass where they are; empty where they may change at any time."""
        return (
            "; the checkpoints here are of these: give the run another name"
            if self.stage.run.complete_checkpoints()
            else ""
        )

    def fresh_model(self) -> nn.Module:
        """The model at update 0, from torch's global generator, which is seeded. Collective."""
        return build_model(self.model, self.text.vocabulary)

    def start_from(self, model: nn.Module, folder: Path) -> None:
        """Take the weights of a checkpoint of train.init_from. Local. Raises DistlmError where they do not fit."""
        weights, card = read_weights(folder)
        take_weights(model, weights, card, self.text.dictionary, f"train.init_from={folder}")

    def saved_model(self, resume: Resume[S]) -> nn.Module:
        """The model that training goes on from. Local."""
        return model_to_train(resume)

    @abstractmethod
    def objective(self, model: Any) -> Objective:
        """The model with its loss."""

    @abstractmethod
    def optimizer(self, objective: Objective) -> torch.optim.Optimizer:
        """The optimizer of `train.*` over all parameters."""

    @abstractmethod
    def run_update(self, state: S) -> tuple[Outcome, float]:
        """Update number state.update over all ranks, and its learning rate. Collective."""

    def finished(self, state: S) -> bool:
        """Whether there is no update left."""
        return state.update >= self.updates

    def validation_due(self, state: S) -> bool:
        """Whether to validate after the update just done."""
        every = self.train.valid_every
        return self.finished(state) or (every > 0 and state.update % every == 0)

    @abstractmethod
    def validate(self, state: S) -> Validation:
        """Loss on the valid split. Collective."""

    def resumed(self, resume: Resume[S]) -> None:
        """Read what `kept` wrote. Local."""
        return

    def counted(self, state: S, outcome: Outcome) -> None:
        """`state` counts the update just done."""
        return

    def close(self) -> None:
        """Training is over, or stops here. Local."""
        return

    def measured(self, keep: bool = False) -> metrics.Values:
        """Further metrics since the last line of metrics; `keep`: they count for the next line, too. Collective."""
        return {}

    def judged(self, state: S, result: Validation) -> metrics.Values:
        """Act upon a validation loss; further metrics of that update. Collective."""
        return {}

    def kept(self, state: S) -> Kept:
        """What a checkpoint needs besides. Collective."""
        return Kept()
