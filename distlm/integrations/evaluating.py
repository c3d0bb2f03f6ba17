"""A model that is not ours, at work in evaluation and left as it was, by one thread at a time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_locks: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()
"""The RLock of each model, whatever is round it: its modules have one `training` and one set of hooks for all."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model without dropout for the block; each part is afterwards as it was. Another thread's block of the same
    model waits; one inside another of the same thread does not."""
    with _locks.setdefault(model, threading.RLock()):
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
