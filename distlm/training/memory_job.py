"""What every training of a model with product-key memories shares: its files, and the step of its values."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distlm.memory.files import load_table, save_table
from distlm.memory.optimizer import SparseValueOptimizer
from distlm.models.io import read_weights
from distlm.training.checkpoint import Resume
from distlm.training.engine import Step
from distlm.training.job import Job, Kept


class MemoryJob(Job):
    """A job whose model `net` has `memories` (layer → memory), maybe none."""

    net: Any
    values: SparseValueOptimizer
    """Of the memories' values; made with the objective."""

    @abstractmethod
    def build(self) -> Any:
        """The model with fresh weights. Collective."""

    def saved_model(self, resume: Resume) -> Any:
        self.net = self.build()
        weights, _ = read_weights(resume.folder)
        for name, parameter in self.net.named_parameters():
            parameter.data = weights[name]
        return self.net

    def resumed(self, resume: Resume) -> None:
        for layer, memory in self.net.memories.items():
            memory.load_extra(load_table(memory.table, resume.folder, layer))

    def step(self, rate: float) -> Step:
        """One step of the parameters and, unless DeepSpeed skipped that, of the values. Collective."""
        # What the engine averages over ranks and scales for fp16 it does not see in the values' gradients.
        undo = 1 / (self.micro.ranks * self.engine.loss_scale)
        step = self.engine.update(rate)
        if step.skipped:
            self.values.drop()
        else:
            self.values.step(undo)
        return step

    def kept(self, state: dict[str, Any]) -> Kept:
        extra = {layer: memory.extra_state_tensors() for layer, memory in self.net.memories.items()}
        return Kept(write=lambda folder: self.write(folder, extra))

    def write(self, folder: Path, extra: Mapping[int, Mapping[str, Tensor]]) -> None:
        """This rank's files of a checkpoint; `extra` of each layer as ProductKeyMemory gives it. Local."""
        for layer, memory in self.net.memories.items():
            save_table(memory.table, folder, layer, extra[layer])
