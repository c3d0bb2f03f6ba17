"""Weights as safetensors files of bounded size, as Hugging Face names them; a file is in memory at a time."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from distlm.runtime.files import order_metadata

LIMIT = 2 << 30
"""Bytes of a file: 2 GiB. A larger tensor has a file of its own."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when its file is written."""

    name: str
    bytes: int
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Pending":
        """A tensor that is there."""
        return cls(name, tensor.nbytes, lambda: tensor)


def write_weights(tensors: Iterable[Pending], folder: Path, metadata: Mapping[str, str]) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors and an index of them.

    `metadata` goes into each file. Memory: the tensors of one file that `make` makes anew, LIMIT bytes or one
    larger tensor.
    """
    files = _cut(list(tensors))
    found: dict[str, str] = {}
    for number, pending in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        held = {each.name: _alone(each.make()) for each in pending}
        save_file(held, folder / name, {"format": "pt", **metadata})
        order_metadata(folder / name)
        found |= dict.fromkeys(held, name)
    if len(files) > 1:
        total = sum(each.bytes for pending in files for each in pending)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(found.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _cut(tensors: Sequence[Pending]) -> list[list[Pending]]:
    files: list[list[Pending]] = [[]]
    size = 0
    for each in tensors:
        if files[-1] and size + each.bytes > LIMIT:
            files.append([])
            size = 0
        files[-1].append(each)
        size += each.bytes
    return files


def _alone(tensor: Tensor) -> Tensor:
    """safetensors refuses tensors that share memory."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
