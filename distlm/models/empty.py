"""Models without memory for their parameters, for counting them and for loading weights into."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWN = {f"{name}_" for name in ("normal", "uniform", "trunc_normal", "kaiming_uniform", "xavier_uniform")}


class _NothingDrawn(TorchFunctionMode):
    """First weights are not drawn. On the meta device that is no work, but loads torch's compiler: a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _DRAWN:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Modules made inside it have parameters of arbitrary values."""
    with _NothingDrawn():
        yield


@contextmanager
def empty_model() -> Iterator[None]:
    """Modules made inside it are on the meta device."""
    with _NothingDrawn(), torch.device("meta"):
        yield
