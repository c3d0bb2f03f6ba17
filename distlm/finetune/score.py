"""Scoring of a task's dev set over all ranks, with the use of the memory by the rows of each label."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from distlm.finetune.data import Outputs, TaskData
from distlm.finetune.model import TaskModel
from distlm.finetune.objective import TaskOutput
from distlm.finetune.records import LabelsApart, TaskMemoryUse
from distlm.finetune.tasks.features import Rows
from distlm.finetune.tasks.spans import CANDIDATES
from distlm.memory import measures
from distlm.memory.records import MemoryUse
from distlm.memory.usage import Usage, UsageCounts
from distlm.runtime.metrics import Values
from distlm.training.engine import Engine
from distlm.training.validate import Validation, require_finite_loss


@dataclass(frozen=True)
class TaskValidation(Validation):
    """A dev set's loss (per row) and metrics. `tokens` are rows."""

    scores: dict[str, float]
    memory: dict[str, TaskMemoryUse]
    """Layer → use on (the first split of) dev; for a task of labels also how the labels differ."""
    outputs: Outputs
    """What the scores were taken from."""

    @property
    def text(self) -> str:
        found = ", ".join(f"{name} {value:.4f}" for name, value in self.scores.items())
        return f"dev loss {self.loss:.4f}, {found} ({self.rule})"

    @property
    def values(self) -> Values:
        memory: dict[str, float | None] = {}
        for layer, found in self.memory.items():
            measured: dict[str, float | None] = {name: getattr(found, name) for name in MemoryUse.__struct_fields__}
            for pair, apart in (found.labels or {}).items():
                measured |= {f"labels/{pair}/kl": apart.kl, f"labels/{pair}/iou": apart.iou}
            memory |= {f"memory/{layer}/dev/{name}": value for name, value in measured.items()}
        return {"valid/loss": self.loss, **{f"dev/{name}": value for name, value in self.scores.items()}, **memory}

    @property
    def last(self) -> dict[str, float]:
        return {"valid_loss": self.loss, **self.scores}


@dataclass(frozen=True)
class _Batch:
    """Rows that go through the model together, over all ranks."""

    numbers: npt.NDArray[np.int64]
    real: npt.NDArray[np.bool_]
    """False: repeated to fill the batch, counts for nothing."""


class SplitScorer:
    """Runs a model over one split.

    A batch holds rows of one label only, so that the use of a memory can be told by label; rows of similar length lie
    together. Neither depends on the rank count. (In evaluation a query norm uses its running statistics, so what else
    is in a batch does not matter.)
    """

    def __init__(self, rows: Rows, span: bool, labels: int, batch: int) -> None:
        """labels: how many there are (0: rows are not told apart); `batch` rows over all ranks."""
        self.rows, self.span = rows, span
        group = rows.labels if labels else np.zeros(len(rows), np.int64)
        self.groups = [self._batches(np.flatnonzero(group == label), batch) for label in range(max(labels, 1))]

    def run(self, engine: Engine, net: TaskModel, rank: int, ranks: int) -> "tuple[float, Tensor, _Use]":
        """Σ of the losses, the outputs fp32 [n, F] in the order of the rows, and the use of each memory by label: the
        same on every rank. Collective."""
        found: list[Tensor] = []
        use: _Use = {layer: [] for layer in net.memories}
        engine.eval()
        for batches in self.groups:
            with ExitStack() as stack, torch.no_grad():
                counters = {layer: stack.enter_context(memory.measure()) for layer, memory in net.memories.items()}
                found += [self._forward(engine, batch, rank, ranks) for batch in batches]
                _reduce(counters, net, use)
        engine.train()
        batches = [batch for group in self.groups for batch in group]
        # [ranks, batches, rows of a rank, F + 1] → [batches, rows, F + 1]
        everyone = _gather(torch.stack(found), ranks).transpose(0, 1).flatten(1, 2)
        outputs = everyone.new_zeros(len(self.rows), everyone.shape[2])
        for batch, given in zip(batches, everyone, strict=True):
            outputs[torch.from_numpy(batch.numbers[batch.real])] = given[torch.from_numpy(batch.real)]
        return float(outputs[:, -1].sum(dtype=torch.float64)), outputs[:, :-1], use

    def _batches(self, numbers: npt.NDArray[np.int64], size: int) -> list[_Batch]:
        numbers = numbers[np.argsort(self.rows.lengths[numbers], kind="stable")]
        batches = []
        for start in range(0, len(numbers), size):
            mine = numbers[start : start + size]
            filled = np.concatenate([mine, np.repeat(mine[-1:], size - len(mine))])
            batches.append(_Batch(filled, np.arange(size) < len(mine)))
        return batches

    def _forward(self, engine: Engine, batch: _Batch, rank: int, ranks: int) -> Tensor:
        """This rank's rows of a batch: fp32 [rows, F + 1], the loss last."""
        size = len(batch.numbers) // ranks
        mine = slice(rank * size, (rank + 1) * size)
        numbers, length = batch.numbers[mine], self.rows.padded_length(batch.numbers)
        given = self.rows.batch(numbers, length)
        counted = given.counted & batch.real[mine, None]
        tokens, types, text, counts = (
            torch.from_numpy(array).to(engine.device) for array in (given.tokens, given.types, given.text, counted)
        )
        output: TaskOutput = engine.forward(
            tokens, types, text, counts, None, targets_of(self.rows, numbers).to(engine.device)
        )
        scores = output.scores
        if self.span:
            inside = given.counted & (np.arange(length) >= self.rows.second[numbers][:, None])
            scores = _candidates(
                scores.masked_fill(~torch.from_numpy(inside).to(scores.device)[:, :, None], -torch.inf)
            )
        return torch.cat((scores, output.losses[:, None]), 1).cpu()


_Use = dict[int, list[UsageCounts]]


class TaskScorer:
    """Runs a model over dev and scores it, and over test."""

    def __init__(self, task: TaskData, batch: int) -> None:
        self.task = task
        labels = len(task.labels)
        span = task.head == "span"
        self.splits = {name: SplitScorer(rows, span, labels, batch) for name, rows in task.dev.items()}
        self.tests = {name: SplitScorer(rows, span, 0, batch) for name, rows in task.test.items()}

    def run(self, engine: Engine, net: TaskModel, rank: int, ranks: int) -> TaskValidation:
        """Collective. Raises Diverged when the loss is not finite."""
        outputs, memory = {}, {}
        loss = 0.0
        for number, (name, scorer) in enumerate(self.splits.items()):
            total, found, use = scorer.run(engine, net, rank, ranks)
            outputs[name] = found.numpy()
            if number == 0:
                loss = total / len(scorer.rows)
                memory = {str(layer): _measures(counts, self.task.labels) for layer, counts in use.items()}
        require_finite_loss(loss)
        rows = sum(len(scorer.rows) for scorer in self.splits.values())
        return TaskValidation(loss, rows, f"{rows} rows of dev", self.task.score(outputs), memory, outputs)

    def run_tests(self, engine: Engine, net: TaskModel, rank: int, ranks: int) -> Outputs:
        """What the model gives for the splits of test. Collective."""
        return {name: scorer.run(engine, net, rank, ranks)[1].numpy() for name, scorer in self.tests.items()}


def targets_of(rows: Rows, numbers: npt.NDArray[np.integer]) -> Tensor:
    """Labels of some rows: int64, or fp32 of a regression."""
    labels = rows.labels[numbers]
    return torch.from_numpy(labels.astype(np.float32) if labels.dtype.kind == "f" else labels.astype(np.int64))


def _candidates(scores: Tensor) -> Tensor:
    """[B, T, 2] → the best beginnings and ends [B, 4·CANDIDATES]: their scores and their places."""
    kept = min(CANDIDATES, scores.shape[1])
    # A stable sort: of equal scores the first token, on every device.
    ordered, places = scores.transpose(1, 2).sort(dim=2, descending=True, stable=True)
    shape = (len(scores), 2, CANDIDATES)
    best, where = scores.new_full(shape, -torch.inf), scores.new_zeros(shape)
    best[:, :, :kept], where[:, :, :kept] = ordered[:, :, :kept], places[:, :, :kept].float()
    return torch.cat((best, where), 1).flatten(1)


def _gather(mine: Tensor, ranks: int) -> Tensor:
    """[…] of each rank → [ranks, …]. Collective."""
    if ranks == 1:
        return mine[None]
    everyone = mine.new_empty(ranks * mine.shape[0], *mine.shape[1:])
    dist.all_gather_into_tensor(everyone, mine.contiguous())
    return everyone.view(ranks, *mine.shape)


def _reduce(counters: Mapping[int, Usage], net: TaskModel, use: _Use) -> None:
    for layer, usage in counters.items():
        use[layer].append(usage.reduced(net.memories[layer].exchange))


def _measures(counts: list[UsageCounts], labels: tuple[str, ...]) -> TaskMemoryUse:
    """Of all rows, and `labels`: "B|A" → KL(B ‖ A) and IOU of the top-1 reads of two labels (Kim & Jung, Fig. 4)."""
    found = UsageCounts.total(counts).measures()
    use = TaskMemoryUse(
        mu=_number(found.mu), top1_mu=_number(found.top1_mu), kl_u=_number(found.kl_u), kl_w=_number(found.kl_w),
        gini=_number(found.gini),
    )  # fmt: skip
    if labels:
        pairs = [(i, j) for i in range(len(labels)) for j in range(i + 1, len(labels))]
        use.labels = {
            f"{labels[j]}|{labels[i]}": LabelsApart(
                _number(measures.class_divergence(counts[j].top1, counts[i].top1)),
                _number(measures.intersection_over_union(counts[j].top1, counts[i].top1)),
            )
            for i, j in pairs
        }
    return use


def _number(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and np.isfinite(value) else None
