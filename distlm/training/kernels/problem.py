"""What a kernel and torch are compared on: each operation of distlm.kernels, on random numbers of given shapes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distlm.kernels.choice import Operation
from distlm.memory.config import MemoryConfig
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.lookup import score_gradients, token_sums
from distlm.memory.retrieval import select
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.gradient import ValueGradient
from distlm.memory.values.rows import update_rows
from distlm.memory.values.table import ValueTable
from distlm.models.linear_cross_entropy import cross_entropy_sum, linear_log_probs

OF_MEMORY: tuple[Operation, ...] = ("lookup", "weights", "update", "slots")
OF_SOFTMAX: tuple[Operation, ...] = ("cross_entropy", "log_probs")
_SUB_KEYS = 256
"""Of a table of the comparison at most: 65,536 slots lie in no GPU's cache and take no GPU's memory."""
_EVERY = 5
"""Of an updated table every fifth slot is compared."""
_CLASSES = 20_000
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""train.precision → what it computes in."""


@dataclass(frozen=True)
class Problem:
    """Shapes of a comparison. It takes 1.5 GB of the device at most, of these shapes: two tables with their moments, or
    logits and what torch makes of them, each 4·65,536·768 or 4·4096·20,000 bytes several times."""

    tokens: int = 4096
    """Of a forward pass."""
    width: int = 768
    """D."""
    columns: int = 768
    """Columns of the values that a rank has."""
    sub_keys: int = 512
    """n."""
    heads: int = 4
    k: int = 32
    """Slots read by each head for each token."""
    key_width: int = 256
    moments: str = "fp32"
    """memory.moments."""
    row_steps: bool = False
    """memory.row_steps."""
    classes: int = _CLASSES
    """Of a softmax."""
    precision: str = "fp32"
    """train.precision."""
    memory: bool = True
    """Whether there is one."""

    @staticmethod
    def of(model: nn.Module, vocabulary: int, precision: str) -> "Problem":
        """That of a model's first memory, where it has one, and of its softmax."""
        fit = Problem(
            width=int(getattr(model, "width", Problem.width)),
            classes=min(vocabulary, _CLASSES),
            precision=precision,
            memory=False,
        )
        found = next((part for part in model.modules() if isinstance(part, ProductKeyMemory)), None)
        if found is None:
            return fit
        c = found.config
        return replace(
            fit, columns=found.table.values.shape[1], sub_keys=c.sub_keys, heads=c.heads, k=c.k, key_width=c.key_width,
            moments=c.moments, row_steps=c.row_steps, memory=True,
        )  # fmt: skip

    def config(self, sub_keys: int) -> MemoryConfig:
        """Settings of such a memory."""
        return MemoryConfig(
            kind="resm", sub_keys=sub_keys, heads=self.heads, k=self.k, key_width=self.key_width, values="zero",
            moments="bf16" if self.moments == "bf16" else "fp32", row_steps=self.row_steps,
        )  # fmt: skip


Work = Callable[[], list[Tensor]]
"""Does an operation once, by whatever `choice` says; its results."""


class _Random:
    """Random tensors, the same each time on a device; torch's own generators are left alone."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(1)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def below(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self.generator, device=self.device)


def make(operation: Operation, problem: Problem, device: torch.device) -> Work:
    """The operation on tensors of `device`; those that it changes are its own."""
    return _MAKERS[operation](problem, _Random(device))


def _reads(problem: Problem, random: _Random) -> tuple[Tensor, Tensor, Tensor]:
    """A table, and slots and weights of all reads of it."""
    count = problem.heads * problem.k
    slots = min(problem.sub_keys, _SUB_KEYS) ** 2
    weights = random.normal(problem.tokens, count).softmax(1)
    table = random.normal(slots, problem.columns)
    return table, random.below(slots, problem.tokens, count).int(), weights


def _lookup(problem: Problem, random: _Random) -> Work:
    table, slots, weights = _reads(problem, random)
    return lambda: [token_sums(table, slots, weights)]


def _weights(problem: Problem, random: _Random) -> Work:
    table, slots, _ = _reads(problem, random)
    gradient = random.normal(problem.tokens, problem.columns)
    return lambda: [score_gradients(table, slots, gradient)]


def _update(problem: Problem, random: _Random) -> Work:
    values, slots, weights = _reads(problem, random)
    config = problem.config(min(problem.sub_keys, _SUB_KEYS))
    table = ValueTable(config, problem.columns, 1, 0, Exchange.alone()).to(random.device)
    table.values.copy_(values)
    # Moments as of some updates: a first step has the sign of a gradient, whatever its size, and so of rounding.
    m, v = table.make_moments()
    m.copy_(values)
    v.copy_(values.square().add_(1))
    table.updates = 9
    stash = ValueGradient(table.slots, problem.columns, Exchange.alone())
    stash.limit = 1 << 62
    stash.add(slots, weights, random.normal(problem.tokens, problem.columns))
    sums = stash.take()
    assert sums is not None
    return lambda: [update_rows(table, sums, 0.5), *(plane[::_EVERY] for plane in table.planes())]


def _slots(problem: Problem, random: _Random) -> Work:
    dtype = DTYPES[problem.precision]
    queries = random.normal(problem.tokens, problem.heads, problem.key_width, dtype=dtype)
    keys = random.normal(problem.heads, 2, problem.sub_keys, problem.key_width // 2, dtype=dtype)
    return lambda: list(select(queries, keys, problem.k))


def _cross_entropy(problem: Problem, random: _Random) -> Work:
    hidden, weight, targets = _softmax(problem, random)
    bias = random.normal(problem.classes, dtype=weight.dtype).requires_grad_()
    return lambda: _differentiated(cross_entropy_sum(hidden, weight, bias, targets), hidden, weight, bias)


def _log_probs(problem: Problem, random: _Random) -> Work:
    hidden, weight, targets = _softmax(problem, random)
    return lambda: _differentiated(linear_log_probs(hidden, weight, targets).sum(), hidden, weight)


def _softmax(problem: Problem, random: _Random) -> tuple[Tensor, Tensor, Tensor]:
    dtype = DTYPES[problem.precision]
    hidden = random.normal(problem.tokens, problem.width, dtype=dtype).requires_grad_()
    weight = (random.normal(problem.classes, problem.width) * problem.width**-0.5).to(dtype).requires_grad_()
    return hidden, weight, random.below(problem.classes, problem.tokens)


def _differentiated(total: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [total.detach(), *torch.autograd.grad(total, inputs)]


_MAKERS: dict[Operation, Callable[[Problem, _Random], Work]] = {
    "lookup": _lookup, "weights": _weights, "update": _update, "slots": _slots, "cross_entropy": _cross_entropy,
    "log_probs": _log_probs,
}  # fmt: skip
