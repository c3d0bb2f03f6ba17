"""Queues and encoder in a checkpoint folder, readable on any number of ranks.

words-RRRRR-of-NNNNN.safetensors   the table of rank R of N: row j is word R + j·N
encoder.safetensors                weights of the momentum encoder, fp32, by the model's parameter names
That files are whole and unchanged is for the checkpoint's marker to say (distlm.training.checkpoint).
"""

import re
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distlm.errors import DistlmError
from distlm.models.transformer.regularisers.encoder import MomentumEncoder
from distlm.models.transformer.regularisers.tables import WordTable
from distlm.system_errors import refuse

ENCODER = "encoder.safetensors"
_NAME = re.compile(r"words-(\d+)-of-(\d+)\.safetensors")


def save_table(table: WordTable, folder: Path, rank: int, ranks: int) -> None:
    """Write one rank's words. Local. Raises OSError or SafetensorError when it cannot be written."""
    tensors = {name: tensor.cpu() for name, tensor in table.tensors().items()}
    safetensors.torch.save_file(tensors, folder / f"words-{rank:05d}-of-{ranks:05d}.safetensors")


def load_table(table: WordTable, folder: Path, rank: int, ranks: int) -> None:
    """Fill one rank's table from the files of any number of ranks. Local; at most one file is in memory at once.

    Raises DistlmError when files are missing, unreadable or of another shape.
    """
    found = {path: _NAME.fullmatch(path.name) for path in sorted(folder.glob("words-*.safetensors"))}
    parts = {int(match[1]): (path, int(match[2])) for path, match in found.items() if match}
    writers = {of for _, of in parts.values()}
    if len(writers) != 1 or set(parts) != set(range(*writers)):
        raise DistlmError(
            f"{folder}: queues of the words of {len(parts)} ranks, of {max(writers, default=1)} that wrote them; "
            "copy the whole checkpoint folder, or delete it to continue from the checkpoint before it"
        )
    own = torch.arange(rank, rank + len(table.pushed) * ranks, ranks)
    for writer, (path, of) in parts.items():
        mine = torch.nonzero(own % of == writer).flatten()
        rows, held = own[mine] // of, _read(path)
        for name, tensor in table.tensors().items():
            if name not in held or held[name].shape[1:] != tensor.shape[1:] or (rows >= len(held[name])).any():
                wanted = [int(rows.max()) + 1, *tensor.shape[1:]]
                raise DistlmError(
                    f"{path}: {name} is {list(held[name].shape) if name in held else 'missing'}, and at least {wanted} "
                    "is expected; continue with the model, train.regulariser and train.queue_length it was made with"
                )
            tensor[mine.to(tensor.device)] = held[name][rows].to(tensor.device)


def save_encoder(encoder: MomentumEncoder, folder: Path) -> None:
    """Write the encoder. Local. Raises OSError or SafetensorError when it cannot be written."""
    weights = {name: parameter.cpu() for name, parameter in encoder.model.named_parameters()}
    safetensors.torch.save_file(weights, folder / ENCODER)


@torch.no_grad()
def load_encoder(encoder: MomentumEncoder, folder: Path) -> None:
    """Give the encoder its weights back. Local. Raises DistlmError when there are none, or those of another model."""
    held = _read(folder / ENCODER)
    for name, parameter in encoder.model.named_parameters():
        if name not in held or held[name].shape != parameter.shape:
            raise DistlmError(f"{folder / ENCODER}: no {name} {list(parameter.shape)}; it is of another model")
        parameter.copy_(held[name])


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        refuse(error, path)
        raise DistlmError(
            f"{path}: missing or damaged ({error}); delete {path.parent} to continue from the checkpoint before it"
        ) from error
