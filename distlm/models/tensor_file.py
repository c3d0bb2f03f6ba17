"""Files of tensors: opened, and those that others made looked at before they are used."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from distlm.errors import DistlmError
from distlm.system_errors import told

_ZIP, _PICKLE, _TAR = b"PK", b"\x80", b"ustar"
"""torch.save since 2020, before it, and before 2016."""


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, whose tensors are read one by one. DistlmError naming it where the system refuses to open it,
    for which safetensors gives no reason; SafetensorError where it is cut or damaged."""
    with told(path), safetensors.safe_open(path, framework="pt") as file:
        yield file


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises as open_tensors does."""
    with told(path):
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
        return tensors


def require_tensor_file(path: Path) -> None:
    """DistlmError for a path that is no file, and for one that neither torch.save nor safetensors can have written."""
    if not path.is_file():
        raise DistlmError(f"{path}: {'is a folder; name the file in it' if path.is_dir() else 'no such file'}")
    with path.open("rb") as stream:
        head = stream.read(512)
    of_torch = head.startswith((_ZIP, _PICKLE)) or head[257:262] == _TAR
    # safetensors: the length of its head in 8 bytes, then the head, which is JSON.
    if not of_torch and head[8:9] != b"{":
        what = "empty" if not head else "text" if head.isascii() and b"\0" not in head else "no file of tensors"
        raise DistlmError(f"{path}: is {what}; --weights takes what torch.save or safetensors has written")


def require_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """DistlmError naming the first weight that is NaN or infinite."""
    for name, tensor in weights.items():
        if count := int((~tensor.isfinite()).sum()):
            raise DistlmError(
                f"{source}: {count} of {tensor.numel()} numbers of {name} are NaN or infinite: its training had "
                "diverged, or the file is damaged; import another checkpoint"
            )
