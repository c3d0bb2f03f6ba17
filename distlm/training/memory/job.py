"""What every training of a model with product-key memories shares: its files, and the step of its values."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from msgspec import UNSET, structs
from torch import Tensor

from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.memory.of_model import Memories, load_memories, restore_memories, save_memories, tables_of
from distlm.memory.values.optimizer import SparseValueOptimizer
from distlm.models.buffers import set_buffers
from distlm.models.io import read_weights
from distlm.runtime import metrics
from distlm.training.checkpoint import Resume
from distlm.training.engine import Step
from distlm.training.job import Job, Kept
from distlm.training.records import S, ValueSums


def use_since_last(memories: Mapping[int, Any], keep: bool) -> metrics.Values:
    """How each memory was used since the last line of metrics, and the staleness (Kim & Jung, figure 2) of all updates
    so far, as memory/LAYER/NAME; `keep`: the reads count for the next line, too. Collective."""
    found: metrics.Values = {}
    for layer, memory in memories.items():
        counts = memory.usage.reduced(memory.exchange)
        use = structs.asdict(counts.measures()) | {"stale": counts.stale_share(memory.update)}
        found |= {f"memory/{layer}/{name}": value for name, value in use.items()}
        if not keep:
            memory.usage.reset()
    return found


def require_same_places(memories: Mapping[int, Any], config: Mapping[str, Any], folder: Path) -> None:
    """Raises DistlmError unless the memories are of the layers of a checkpoint's, whose MemoryConfig is `config`."""
    there, shared = MemoryConfig(**config), len(tables_of(memories)) < len(memories)
    if memories and (there.positions, there.shared and len(memories) > 1) != ([*memories], shared):
        raise DistlmError(
            f"{folder}: memories of layers {there.positions}{' with shared values' if there.shared else ''}, and here "
            f"of {[*memories]}{' with shared values' if shared else ''}; set memory.positions and memory.shared as "
            "there"
        )


def take_memories(memories: Mapping[int, Any], config: Mapping[str, Any], folder: Path) -> None:
    """Values and query statistics of a checkpoint's memories; moments and counters start anew. Local.

    `config`: MemoryConfig of the checkpoint. Raises DistlmError as load_table, and for memories of other layers.
    """
    require_same_places(memories, config, folder)
    # What memory.stale=catch_up still owes is due by the rule of the training that owes it.
    found = load_memories(memories, folder, moments=False, source=MemoryConfig(**config))
    for layer, extra in found.items():
        fresh = {n: torch.zeros_like(t) if n.startswith("usage.") else t for n, t in extra.items()}
        memories[layer].load_extra(fresh)


class MemoryJob(Job[S]):
    """A job whose model `net` may have `memories`."""

    RATE_OF_VALUES: ClassVar[str] = "memory.lr"
    """The setting of their learning rate."""
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

    def make_values(self, settings: MemoryConfig) -> None:
        """The optimizer of the memories' values; with the objective. Local."""
        self.values = SparseValueOptimizer.of(settings, list(tables_of(self.memories)))

    @property
    def memories(self) -> Memories:
        """Layer → memory; a model may have none, and not know the word."""
        return getattr(self.net, "memories", {})

    def calmer(self) -> str:
        """The rate of the memories' values is one of its own."""
        return self.CALMER.replace(".lr", f".lr or {self.RATE_OF_VALUES}", 1) if self.memories else self.CALMER

    @abstractmethod
    def build(self) -> Any:
        """The model with fresh weights. Collective."""

    def saved_model(self, resume: Resume[S]) -> Any:
        self.net = self.build()
        weights, _ = read_weights(resume.folder)
        for name, parameter in self.net.named_parameters():
            parameter.data = weights[name]
        set_buffers(self.net, weights)
        return self.net

    def resumed(self, resume: Resume[S]) -> None:
        if (window := resume.state.window) is not UNSET:
            self._steps, self._sent = [*(window.values or [])], [*(window.sent or [])]
        restore_memories(self.memories, resume.folder)

    def begin_update(self, update: int) -> None:
        """Of the number `update`, counted from 1; before its first forward. Local."""
        for memory in self.memories.values():
            memory.update = update
        if self.values.tables:
            self.values.tables[0].exchange.reset()

    def step(self, rate: float) -> Step:
        """One step of the parameters and, unless DeepSpeed skipped that, of the values; ends the update. Collective."""
        # The engine averages over ranks and scales for fp16, but does not see the values' gradients: done here.
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
            # Layers that share values have one update of them.
            for place, (layer, *_) in enumerate(tables_of(self.memories).values()):
                found[f"memory/{layer}/rows"] = fmean(step.rows[place] for step in self._steps)
                found[f"memory/{layer}/grad_norm"] = fmean(step.norms[place] for step in self._steps)
        if not keep:
            self._steps.clear()
            self._sent.clear()
        return found

    def kept(self, state: S) -> Kept:
        if state.window is not UNSET and self.values.tables:
            state.window.values, state.window.sent = [*self._steps], [*self._sent]
        extra = {layer: memory.extra_state_tensors() for layer, memory in self.memories.items()}
        return Kept(write=lambda folder: self.write(folder, extra))

    def write(self, folder: Path, extra: Mapping[int, Mapping[str, Tensor]]) -> None:
        """This rank's files of a checkpoint; `extra` of each layer as ProductKeyMemory gives it. Local."""
        save_memories(self.memories, folder, extra)
