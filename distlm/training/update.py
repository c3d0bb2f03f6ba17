"""What an optimizer update gave over all ranks, and the means over the updates between two lines of metrics."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from msgspec import UNSET, UnsetType
from torch import Tensor

from distlm.errors import Diverged
from distlm.runtime import metrics
from distlm.training.engine import Step, share
from distlm.training.microbatch import MicroBatchPlan
from distlm.training.records import UpdateSums
from distlm.training.records import Window as WindowState

SKIPPED = "train/skipped_updates"


@dataclass(frozen=True)
class Outcome:
    """One update, summed over all ranks."""

    ce: float
    others: Mapping[str, float]
    """Name of a metric → its sum over the tokens."""
    tokens: int
    step: Step
    stop: bool
    fingerprint: int
    """Of the tokens that all ranks were given, whatever the cut and the order within the update."""

    @property
    def loss(self) -> float:
        return self.ce / self.tokens


@dataclass(frozen=True)
class Part:
    """This rank's share of an update."""

    rate: float
    tokens: int
    """Of all ranks."""
    sums: Sequence[Tensor]
    """Per micro-batch of this rank, in order: Σ CE and then the sums `others`."""
    given: int
    """Fingerprint of this rank's tokens."""
    stopping: bool
    """This rank has received a stop signal."""


def combine(part: Part, others: Sequence[str], micro: MicroBatchPlan, step: Step, precision: str) -> Outcome:
    """The update over all ranks. Collective. Raises Diverged when a sum or the gradient is not finite (a gradient in
    fp16 may overflow: then the update was skipped)."""
    # One collective carries the stop flag, the data's fingerprint and the sums.
    everyone = share([float(part.stopping), float(part.given), *torch.stack(list(part.sums)).flatten().tolist()])
    width = 1 + len(others)
    # In the plan's order, so that the rounding does not depend on the rank count.
    ce, *rest = (
        math.fsum(everyone[n % micro.ranks][2 + width * (n // micro.ranks) + i] for n in range(micro.micro_batches))
        for i in range(width)
    )
    if not math.isfinite(ce + sum(rest)) or (step.skipped and precision != "fp16"):
        what = f"loss is {ce / part.tokens}" if not math.isfinite(ce) else "gradient is not finite"
        raise Diverged(f"the {what} (lr {part.rate:.3g})")
    fingerprint = int(sum(row[1] for row in everyone))
    stop = any(row[0] for row in everyone)
    return Outcome(ce, dict(zip(others, rest, strict=True)), part.tokens, step, stop, fingerprint)


class Window:
    """Sums over the updates since the last line of metrics."""

    def __init__(self, unit: str = metrics.TOKENS_PER_S, kept: WindowState | UnsetType = UNSET) -> None:
        """`unit`: name of the rate; `kept`: those of them that were done before a stop."""
        self.unit = unit
        self.outcomes: list[Outcome] = []
        self.began = time.monotonic()
        if kept is not UNSET:
            nothing = Step(0.0, False, 1.0)
            self.outcomes = [Outcome(u.ce, u.others, u.tokens, nothing, False, 0) for u in kept.updates]
            self.began -= kept.seconds

    def state(self) -> WindowState | UnsetType:
        """What a checkpoint keeps of it; UNSET when it is empty."""
        if not self.outcomes:
            return UNSET
        sums = [UpdateSums(one.ce, dict(one.others), one.tokens) for one in self.outcomes]
        return WindowState(updates=sums, seconds=round(time.monotonic() - self.began, 3))

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

    def line(self, rate: float, skipped: int) -> metrics.Values:
        """Means per token, without their weights in the loss; gradient norm, rate and loss scale are the last
        update's."""
        last = self.outcomes[-1]
        return {
            metrics.TRAIN_LOSS: self.loss,
            **{name: sum(item.others[name] for item in self.outcomes) / self.tokens for name in last.others},
            metrics.LEARNING_RATE: rate,
            metrics.GRADIENT_NORM: last.step.gradient_norm if math.isfinite(last.step.gradient_norm) else None,
            metrics.LOSS_SCALE: last.step.loss_scale,
            self.unit: round(self.rate, 1),
            SKIPPED: skipped,
        }
