"""One optimizer update over all ranks, and the means over the updates between two lines of metrics."""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from distlm.data.blocks import gather
from distlm.data.order import rows_for_update
from distlm.errors import DistlmError
from distlm.runtime import metrics
from distlm.runtime.stage import Stage
from distlm.training.engine import Engine, Step, share
from distlm.training.job import Job
from distlm.training.microbatch import micro_seed

SKIPPED = "train/skipped_updates"


@dataclass(frozen=True)
class Outcome:
    """One update, summed over all ranks."""

    ce: float
    penalty: float
    norm: float
    tokens: int
    step: Step
    stop: bool
    fingerprint: int
    """Of the tokens that all ranks were given, whatever the cut and the order within the update."""

    @property
    def loss(self) -> float:
        return self.ce / self.tokens


def run_update(stage: Stage, job: Job, engine: Engine, update: int, rate: float) -> Outcome:
    """One optimizer update over all ranks. The loss is fairseq's: Σ token CE / number of tokens, whatever the cut."""
    train, micro = job.train, job.micro
    rows = rows_for_update(train.seed, update, train.blocks_per_update, len(job.blocks))
    tokens = int(job.blocks.scored[rows].sum())
    # DeepSpeed averages over the M micro-batches of all ranks, hence the factor M.
    scale = micro.micro_batches / tokens
    mine = micro.of_rank(stage.comm.rank)
    sums, given = [], 0
    for number in mine:
        batch = gather(job.ids, job.blocks, rows[micro.blocks_of(number)])
        inputs, targets = (torch.from_numpy(array).to(engine.device) for array in (batch.inputs, batch.targets))
        scored = None if batch.scored.all() else torch.from_numpy(batch.scored).to(engine.device)
        torch.manual_seed(micro_seed(train.seed, update, number))
        result = engine.forward(inputs, targets, scored)
        engine.backward(engine.module.loss(result, scale), last=number == mine[-1])
        sums.append(torch.stack([value.detach() for value in result]))
        given += _fingerprint(batch.targets, job.blocks.lengths[rows[micro.blocks_of(number)]])
    step = engine.update(rate)
    # One collective carries the stop flag, the data's fingerprint and the sums.
    flat = torch.stack(sums).flatten().tolist()
    everyone = share([float(stage.stop.reason is not None), float(given), *flat])
    # In the plan's order, so that the rounding does not depend on the rank count.
    ce, penalty, norm = (
        math.fsum(everyone[n % micro.ranks][2 + 3 * (n // micro.ranks) + i] for n in range(micro.micro_batches))
        for i in range(3)
    )
    if not math.isfinite(ce + train.l2_weight * penalty) or (step.skipped and train.precision != "fp16"):
        what = f"loss is {ce / tokens}" if not math.isfinite(ce) else "gradient is not finite"
        error = DistlmError(
            f"update {update}: the {what} (lr {rate:.3g}); lower train.lr, raise train.warmup_updates or lower "
            "train.clip_norm, and start with another run_dir= (the checkpoints here are from before)"
        )
        error.shared = True
        raise error
    fingerprint = int(sum(row[1] for row in everyone))
    return Outcome(ce, penalty, norm, tokens, step, any(row[0] for row in everyone), fingerprint)


def _fingerprint(targets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> int:
    """Σ over rows of 32 bits of the hash of their tokens, padding left out: exact in fp64 for 2^21 rows."""
    return sum(xxhash.xxh32_intdigest(row[:length].tobytes()) for row, length in zip(targets, lengths, strict=True))


class Window:
    """Sums over the updates since the last line of metrics."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.began = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def pause(self, seconds: float) -> None:
        """Do not count time spent on validation or saving."""
        self.began += seconds

    @property
    def tokens(self) -> int:
        return sum(outcome.tokens for outcome in self.outcomes)

    @property
    def loss(self) -> float:
        return sum(outcome.ce for outcome in self.outcomes) / self.tokens

    @property
    def rate(self) -> float:
        return self.tokens / max(time.monotonic() - self.began, 1e-9)

    def line(self, rate: float, skipped: int) -> dict[str, Any]:
        """Means per token (the penalty without ω); gradient norm, rate and loss scale are the last update's."""
        last = self.outcomes[-1].step
        return {
            metrics.TRAIN_LOSS: self.loss,
            metrics.TRAIN_PENALTY: sum(outcome.penalty for outcome in self.outcomes) / self.tokens,
            metrics.TRAIN_NORM: sum(outcome.norm for outcome in self.outcomes) / self.tokens,
            metrics.LEARNING_RATE: rate,
            metrics.GRADIENT_NORM: last.gradient_norm if math.isfinite(last.gradient_norm) else None,
            metrics.LOSS_SCALE: last.loss_scale,
            metrics.TOKENS_PER_S: round(self.rate, 1),
            SKIPPED: skipped,
        }
