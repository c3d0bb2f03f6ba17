"""What a kind of model brings to the training loop: its data and how it is cut, its updates, its validation."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.device import default_device
from distlm.models.kinds import build_model, kind_of, model_config
from distlm.models.language_model import LanguageModel
from distlm.runtime.collective import together
from distlm.runtime.stage import Stage
from distlm.training.checkpoint import Resume, model_to_train, restore
from distlm.training.engine import Engine
from distlm.training.microbatch import MicroBatchPlan
from distlm.training.objective import Objective
from distlm.training.update import Outcome
from distlm.training.validate import Validation


class Kept(NamedTuple):
    """What a checkpoint holds besides weights, optimizer and `state`."""

    average: str | None
    """Optimizer state that is the model to be used; None: the weights are."""
    hidden: dict[str, Tensor]
    """Hidden states; on rank 0."""


class Job(ABC):
    """One training run on this rank. Opened first, which checks the settings; `begin` then makes the engine.

    `state` is the loop's, goes into state.json, and is the same on every rank.
    """

    updates: int
    """Updates in all; where training may end sooner, the most there can be."""
    engine: Engine
    parameters: int

    def __init__(self, stage: Stage, tokens: TokenFiles, micro: MicroBatchPlan, deepspeed: dict[str, Any]) -> None:
        self.stage, self.train, self.comm = stage, stage.config.train, stage.comm
        self.tokens, self.micro, self.deepspeed = tokens, micro, deepspeed
        self.model = model_config(stage.config)
        taps = kind_of(self.model).taps
        if self.train.tap not in taps:
            raise DistlmError(f"train.tap={self.train.tap!r}: no such hidden state; choose one of {', '.join(taps)}")

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run: then its update number says which data comes next."""
        return {"data": self.tokens.fingerprint, "dictionary": self.tokens.dictionary.hash, "seed": self.train.seed}

    def begin(self, resume: Resume | None) -> None:
        """A fresh engine, or the checkpoint's. Collective."""
        device = default_device()
        if resume is None:
            torch.manual_seed(self.train.seed)
            model = build_model(self.model, len(self.tokens.dictionary))
        else:
            model = together(self.comm, lambda: model_to_train(resume))
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        # DeepSpeed replaces the tensors by half-precision copies; these keep the fp32 values for `restore`.
        weights = {} if resume is None else {name: parameter.data for name, parameter in model.named_parameters()}
        objective = self.objective(model)
        self.engine = Engine(objective, self.optimizer(objective), self.deepspeed, self.stage.world, device)
        if resume is not None:
            restore(self.engine, resume, weights)
            together(self.comm, lambda: self.resumed(resume))

    @abstractmethod
    def objective(self, model: LanguageModel) -> Objective:
        """The model with its loss."""

    @abstractmethod
    def optimizer(self, objective: Objective) -> torch.optim.Optimizer:
        """The optimizer of `train.*` over all parameters."""

    @abstractmethod
    def run_update(self, state: dict[str, Any]) -> tuple[Outcome, float]:
        """Update number state["update"] over all ranks, and its learning rate. Collective."""

    @abstractmethod
    def finished(self, state: dict[str, Any]) -> bool:
        """Whether there is no update left."""

    @abstractmethod
    def validation_due(self, state: dict[str, Any]) -> bool:
        """Whether to validate after the update just done."""

    @abstractmethod
    def validate(self, state: dict[str, Any]) -> Validation:
        """Loss on the valid split. Collective."""

    def resumed(self, resume: Resume) -> None:
        """Read what `kept` wrote. Local."""
        return

    def fresh_state(self) -> dict[str, Any]:
        """Entries of `state` that only this kind of model has, at update 0."""
        return {}

    def counted(self, state: dict[str, Any], outcome: Outcome) -> None:
        """`state` counts the update just done."""
        return

    def judged(self, state: dict[str, Any], result: Validation) -> dict[str, Any]:
        """Act upon a validation loss; further metrics of that update. Collective."""
        return {}

    def kept(self, state: dict[str, Any]) -> Kept:
        """What a checkpoint needs besides. Collective."""
        return Kept(None, {})
