"""Which operations this process does by the kernels of this room; the others are done by torch.

Nothing is, until a training has compared both on its device (distlm.training.kernels) and says so here. All ranks say
the same.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Operation = Literal["lookup", "weights", "update", "slots", "cross_entropy", "log_probs"]
"""lookup: the sums of a memory's forward; weights: the derivatives of their weights; update: the values' gradient and
Adam; slots: the best slots of half scores; cross_entropy: that of a linear layer's outputs, summed over rows, with its
gradients; log_probs: the same for each row, in which the backward makes the products again."""

OPERATIONS: tuple[Operation, ...] = get_args(Operation)

_TAKEN: dict[Operation, str] = {}
"""Operation → kind of device on which the kernel does it."""


def available() -> bool:
    """Whether Triton is installed. CUDA builds of torch bring it."""
    return find_spec("triton") is not None


def taken(operation: Operation, device: torch.device) -> bool:
    """Whether the kernel does this operation on tensors of `device`."""
    return _TAKEN.get(operation) == device.type


def take(operations: Iterable[Operation], device: torch.device) -> None:
    """From now on the kernels do these operations on `device`, and torch does all others."""
    _TAKEN.clear()
    _TAKEN.update(dict.fromkeys(operations, device.type))
