"""`distlm memory bench`: what memories cost (Kim & Jung, table 1), in inference at batch 1 and in a step of training.

Each model is timed in turns with the base model, so that a noisy machine slows both; ratios are medians over the turns.
At most two models are in memory at once.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from distlm.errors import UsageError
from distlm.memory.config import MemoryConfig
from distlm.memory.values.optimizer import SparseValueOptimizer
from distlm.models.plm.config import PlmConfig, PlmRun
from distlm.models.plm.model import Plm, plm_model
from distlm.models.row_dropout import row_keys
from distlm.runtime.progress import say
from distlm.runtime.ranks.device import empty_cache, synchronize

PUBLISHED = {
    "base": 79.8, "base +PKM": 61.4, "base +ResM": 59.3, "large": 43.1, "large +PKM": 37.2, "large +ResM": 36.1
}  # fmt: skip
"""Batches per second on a V100 (table 1)."""
_WARM_UP = 2
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LOSS_SCALE = 1024.0
"""Of fp16; a real training looks for the largest that does not overflow."""


@dataclass(frozen=True)
class Timed:
    """One model beside the base model."""

    name: str
    layers: int
    parameters: int
    """Numbers of the model, those of its memories included."""
    inference_s: float
    """Median seconds of one row's forward."""
    inference_ratio: float
    """Median of its time over the base model's in the same turn."""
    training_s: float | None
    """Median seconds of a step; None where no training was timed."""
    training_ratio: float | None


def run_bench(
    config: PlmRun, tokens: int, turns: int, train_rows: int, device: torch.device, precision: str = "fp32",
    models: Collection[str] = tuple(PUBLISHED),
) -> list[Timed]:  # fmt: skip
    """Time the recipe's model without memory, with PKM and with ResM, and a large one of twice the layers and 4/3 the
    width (BERT-large for BERT-base) likewise.

    tokens: of a row. train_rows: rows of a training step of the base models; 0: none. precision: of weights and
    activations, fp32, fp16 or bf16; a memory's values, and what Adam updates, are fp32 in each. models: those of
    PUBLISHED to time; the base model is in any case. Raises UsageError for a recipe without memory. Memory: the base
    model's training state and the largest model's weights.
    """
    if config.memory.kind == "none":
        raise UsageError("memory bench: the recipe has no memory; take plm-base-resm, or set memory.kind=resm")
    base = _Model("base", config, None, device, precision)
    found = [base.timed(base, tokens, turns, train_rows)]
    for name, large, kind in (
        ("base +PKM", False, "pkm"), ("base +ResM", False, "resm"), ("large", True, None), ("large +PKM", True, "pkm"),
        ("large +ResM", True, "resm"),
    ):  # fmt: skip
        if name not in models:
            continue
        model = _Model(name, enlarged(config) if large else config, kind, device, precision)
        found.append(model.timed(base, tokens, turns, 0 if large else train_rows))
        del model
        gc.collect()
        empty_cache()
    return found


def enlarged(config: PlmRun) -> PlmRun:
    """Twice the layers, 4/3 the width, heads and inner width; memories at twice their positions."""
    plm, memory = config.plm, config.memory
    wider = {name: getattr(plm, name) * 4 // 3 for name in ("width", "heads", "ffn_width")}
    return dataclasses.replace(
        config, plm=dataclasses.replace(plm, layers=2 * plm.layers, **wider),
        memory=dataclasses.replace(memory, positions=[2 * position for position in memory.positions]),
    )  # fmt: skip


def bench_table(found: list[Timed]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table, the paper's column last."""
    head = [
        "model",
        "layers",
        "numbers",
        "batch/s",
        "time ×",
        "training step",
        "training ×",
        "paper batch/s",
        "paper ×",
    ]
    rows = []
    for timed in found:
        paper = PUBLISHED[timed.name]
        training = ["", ""]
        if timed.training_s is not None and timed.training_ratio is not None:
            training = [f"{timed.training_s:.3f} s", f"{timed.training_ratio:.2f}"]
        rows.append(
            [timed.name, str(timed.layers), f"{timed.parameters / 1e6:.1f}M", f"{1 / timed.inference_s:.1f}",
             f"{timed.inference_ratio:.2f}", *training, f"{paper}", f"{PUBLISHED['base'] / paper:.2f}"]
        )  # fmt: skip
    return head, rows


class _Model:
    """A model, its optimizers, and the two things that are timed."""

    def __init__(self, name: str, config: PlmRun, kind: str | None, device: torch.device, precision: str) -> None:
        self.name, self.plm, self.device = name, config.plm, device
        memory = dataclasses.replace(config.memory, kind=kind or "none")  # type: ignore[arg-type]
        self.model = _build(config.plm, memory, config.shards.vocabulary_size).to(device, _DTYPES[precision])
        self.vocabulary = config.shards.vocabulary_size
        self.values = SparseValueOptimizer.of(memory, [layer.table for layer in self.model.memories.values()])
        self.scale = _LOSS_SCALE if precision == "fp16" else 1.0
        self.adam: torch.optim.Optimizer | None = None
        """Of the parameters, or of copies of them in fp32."""
        self.update = 0

    def timed(self, base: "_Model", tokens: int, turns: int, train_rows: int) -> Timed:
        """Time this model and `base` in turns."""
        say(f"memory bench: {self.name}: {turns} turns")
        mine, other = (_clocked(partial(model.infer, tokens), model.device) for model in (self, base))
        inference, ratio = _in_turns(mine, other, turns)
        training: tuple[float, float] | tuple[None, None] = (None, None)
        if train_rows:
            mine, other = (_clocked(partial(model.step, train_rows, tokens), model.device) for model in (self, base))
            training = _in_turns(mine, other, max(2, turns // 4))
            self.adam = None
        numbers = sum(parameter.numel() for parameter in self.model.parameters()) + self.model.memory_numbers
        return Timed(self.name, self.plm.layers, numbers, inference, ratio, *training)

    def infer(self, tokens: int) -> None:
        """The forward of one row, as a classifier needs it."""
        self.model.eval()
        rows, mask = self._rows(1, tokens)
        with torch.no_grad(), self.model.rows.set(None, mask, mask):
            self.model(rows)

    def step(self, count: int, tokens: int) -> None:
        """Forward, backward and update of masked language modelling."""
        self.model.train()
        parameters = list(self.model.parameters())
        if self.adam is None:
            masters = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
            self.adam = torch.optim.Adam(masters, lr=1e-5, fused=True)
        rows, mask = self._rows(count, tokens)
        labels = torch.where(torch.rand(rows.shape, device=self.device) < 0.15, rows, -100)
        keys = row_keys(1, self.update, range(count))
        with self.model.rows.set(keys.to(self.device), mask, mask):
            (self.model.loss_sum(self.model(rows), labels) * (self.scale / count)).backward()
        masters = self.adam.param_groups[0]["params"]
        copies = [pair for pair in zip(masters, parameters, strict=True) if pair[0] is not pair[1]]
        for master, parameter in copies:
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float().div_(self.scale), None
        self.adam.step()
        self.adam.zero_grad()
        for master, parameter in copies:
            parameter.data.copy_(master)
        self.values.update(1 / self.scale)
        self.update += 1

    def _rows(self, count: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(1000 % self.vocabulary, self.vocabulary, (count, tokens), device=self.device)
        return rows, torch.ones(count, tokens, dtype=torch.bool, device=self.device)


def _build(plm: PlmConfig, memory: MemoryConfig, vocabulary: int) -> Plm:
    return Plm(plm_model(plm, memory, seed=1), vocabulary)


def _clocked(work: Callable[[], None], device: torch.device) -> Callable[[], float]:
    """`work`, giving the seconds that it took."""

    def once() -> float:
        began = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - began

    return once


def _in_turns(mine: Callable[[], float], other: Callable[[], float], turns: int) -> tuple[float, float]:
    """Median seconds of the first, and median of its ratio to the second, one after the other in every turn."""
    for _ in range(_WARM_UP):
        mine(), other()
    pairs: list[Any] = [(mine(), other()) for _ in range(turns)]
    return statistics.median(a for a, _ in pairs), statistics.median(a / b for a, b in pairs)
