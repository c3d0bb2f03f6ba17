"""What every training of a model with product-key memories shares: its files, and the step of its values."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from msgspec import UNSET
from torch import Tensor

from distlm.memory.config import MemoryConfig
from distlm.memory.values.adam import Adam
from distlm.memory.values.files import load_table, save_table
from distlm.memory.values.optimizer import SparseValueOptimizer
from distlm.models.io import read_weights
from distlm.runtime import metrics
from distlm.training.checkpoint import Resume
from distlm.training.engine import Step
from distlm.training.job import Job, Kept
from distlm.training.records import S, ValueSums


def take_memories(memories: Mapping[int, Any], config: Mapping[str, Any], folder: Path) -> None:
    """Values and query statistics of a checkpoint's memories; moments and counters start anew. Local.

    `config`: MemoryConfig of the checkpoint. Raises DistlmError as load_table.
    """
    for layer, memory in memories.items():
        # What memory.stale=catch_up still owes is due at the rate of the training that owes it.
        rule, memory.table.rule = memory.table.rule, Adam.of(MemoryConfig(**config))
        extra = load_table(memory.table, folder, layer, moments=False)
        memory.table.rule = rule
        memory.load_extra({n: torch.zeros_like(t) if n.startswith("usage.") else t for n, t in extra.items()})


class MemoryJob(Job[S]):
    """A job whose model `net` has `memories` (layer → memory), maybe none."""

    net: Any
    values: SparseValueOptimizer
    """Of the memories' values; made with the objective."""

    def __init__(self, *given: Any) -> None:
        """What Job takes."""
        super().__init__(*given)
        self._steps: list[ValueSums] = []
        """Updates of the values since the last line of metrics."""
        self._sent: list[int] = []
        """Bytes that this rank has sent for all memories in each update since then, skipped ones included."""

    @abstractmethod
    def build(self) -> Any:
        """The model with fresh weights. Collective."""

    def saved_model(self, resume: Resume[S]) -> Any:
        self.net = self.build()
        weights, _ = read_weights(resume.folder)
        for name, parameter in self.net.named_parameters():
            parameter.data = weights[name]
        return self.net

    def resumed(self, resume: Resume[S]) -> None:
        if (window := resume.state.window) is not UNSET:
            self._steps, self._sent = [*(window.values or [])], [*(window.sent or [])]
        for layer, memory in self.net.memories.items():
            memory.load_extra(load_table(memory.table, resume.folder, layer))

    def begin_update(self, update: int) -> None:
        """Of the number `update`, counted from 1; before its first forward. Local."""
        for memory in self.net.memories.values():
            memory.update = update
        if self.values.tables:
            self.values.tables[0].exchange.reset()

    def step(self, rate: float) -> Step:
        """One step of the parameters and, unless DeepSpeed skipped that, of the values; ends the update. Collective."""
        # What the engine averages over ranks and scales for fp16 it does not see in the values' gradients.
        undo = 1 / (self.micro.ranks * self.engine.loss_scale)
        step = self.engine.update(rate)
        if step.skipped:
            self.values.drop()
        else:
            done = self.values.update(undo)
            self._steps.append(ValueSums(done.rows, done.norms))
        if self.values.tables:
            # All memories have one exchange.
            self._sent.append(sum(self.values.tables[0].exchange.bytes.values()))
        return step

    def measured(self, keep: bool = False) -> metrics.Values:
        """Means over the updates since the last line: slots that were read (`rows`) and 2-norm of the values' gradient
        before clipping (`grad_norm`) of each memory, and bytes that a rank has sent for all of them."""
        found: metrics.Values = {}
        if self._sent:
            found[metrics.MEMORY_SENT_BYTES] = fmean(self._sent)
        if self._steps and not self.values.config.frozen:
            for place, layer in enumerate(self.net.memories):
                found[f"memory/{layer}/rows"] = fmean(step.rows[place] for step in self._steps)
                found[f"memory/{layer}/grad_norm"] = fmean(step.norms[place] for step in self._steps)
        if not keep:
            self._steps.clear()
            self._sent.clear()
        return found

    def kept(self, state: S) -> Kept:
        if state.window is not UNSET and self.values.tables:
            state.window.values, state.window.sent = [*self._steps], [*self._sent]
        extra = {layer: memory.extra_state_tensors() for layer, memory in self.net.memories.items()}
        return Kept(write=lambda folder: self.write(folder, extra))

    def write(self, folder: Path, extra: Mapping[int, Mapping[str, Tensor]]) -> None:
        """This rank's files of a checkpoint; `extra` of each layer as ProductKeyMemory gives it. Local."""
        for layer, memory in self.net.memories.items():
            save_table(memory.table, folder, layer, extra[layer])
