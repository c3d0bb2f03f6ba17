"""The state of a recurrent model before each evaluation block, where a split is read in one go (knn.carry).

One rank reads a split without the softmax, each split another one, and keeps the state at each block's beginning,
FOLDER/carried.npy fp32 [blocks, S] until the folder is finished. From there on any rank computes any block, as without
`carry`. What a stopped start has read is in carried-part.npy.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distlm.data.blocks import Blocks, require_ids
from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError, Stopped
from distlm.knnlm.search.forward import Forward
from distlm.models.language_model import LanguageModel
from distlm.runtime.files import atomic_path, load_array, save_array
from distlm.runtime.progress import Progress
from distlm.runtime.ranks.collective import together
from distlm.runtime.ranks.one_thread import one_thread
from distlm.runtime.stage import Stage

CARRIED, PART = "carried.npy", "carried-part.npy"
KEPT_EVERY_S = 60.0
"""What was read is kept so often, so that a kill costs no more of it."""
Carried = npt.NDArray[np.float32]
_NONE: Carried = np.empty((0, 0), np.float32)


class OfSplit(Protocol):
    """Work on one split in one folder."""

    @property
    def split(self) -> str:
        """Its name."""

    @property
    def blocks(self) -> Blocks:
        """The split's evaluation blocks."""

    @property
    def folder(self) -> Path:
        """Where its files are."""


@torch.inference_mode()
def states_before(
    model: LanguageModel,
    ids: npt.NDArray[np.integer],
    blocks: Blocks,
    advance: Callable[[Tensor], None] = lambda states: None,
    begun: Carried = _NONE,
) -> Carried:
    """fp32 [blocks, S]: the state of a recurrent model before each block of the text `ids` [tokens], which is read from
    the zero state; the first input is </s>. `blocks` follow each other without a gap. On a CPU with one thread, so that
    the bits do not follow their number. `advance` is given what there is after each block; of `begun` fp32 [n, S], the
    first of them, nothing is read again."""
    device = next(model.parameters()).device
    states = torch.zeros(len(blocks), model.state_width, device=device)
    if len(begun):
        states[: len(begun)] = torch.from_numpy(np.array(begun)).to(device)
    with one_thread():
        for number in range(max(len(begun), 1) - 1, len(blocks) - 1):
            first, last = int(blocks.start[number]), int(blocks.end[number])
            words = np.array(ids[max(0, first - 1) : last - 1], dtype=np.int64)
            if first == 0:
                words = np.concatenate([[Dictionary.EOS], words])
            require_ids(words, model.vocabulary, first)
            states[number + 1] = model.read(torch.from_numpy(words).to(device), states[number])
            advance(states[: number + 2])
    return states.cpu().numpy()


def make_carried(stage: Stage, forward: Forward, works: Sequence[OfSplit]) -> None:
    """Write carried.npy of each work, unless it is there: the i-th by rank i modulo their number; this job is the
    only writer of the folders. Collective. Raises Stopped after a stop signal: the next start goes on."""

    def make() -> None:
        for work in list(works)[stage.comm.rank :: stage.comm.size]:
            if not (work.folder / CARRIED).exists():
                _read(stage, forward, work)

    together(stage.comm, make)


def _read(stage: Stage, forward: Forward, work: OfSplit) -> None:
    part, begun = work.folder / PART, _NONE
    if part.exists():
        begun = load_array(part)
    kept = time.monotonic()
    with Progress(f"read {work.split} in one go", len(work.blocks), "blocks") as progress:
        progress.advance(len(begun))

        def advance(states: Tensor) -> None:
            nonlocal kept
            progress.advance(1)
            stops = stage.stop.reason is not None
            if stops or time.monotonic() > kept + KEPT_EVERY_S:
                _write(part, states.cpu().numpy())
                kept = time.monotonic()
            if stops:
                raise Stopped(f"{work.folder}: stopped while reading {work.split} in one go; the same command goes on")

        states = states_before(forward.model, forward.tokens.split(work.split), work.blocks, advance, begun)
    _write(work.folder / CARRIED, states)
    part.unlink(missing_ok=True)


def _write(path: Path, states: Carried) -> None:
    with atomic_path(path) as temporary:
        save_array(temporary, states)


def open_carried(folder: Path) -> Carried:
    """Memory-mapped. Raises DistlmError when the file is missing or cut."""
    try:
        found: Carried = load_array(folder / CARRIED)
    except (OSError, ValueError) as error:
        raise DistlmError(f"{folder / CARRIED}: missing or cut ({error}); remove {folder} and make it again") from error
    return found


def carried_bytes(model: LanguageModel, blocks: Blocks, carry: bool) -> int:
    """Disk that both files take, while one becomes the other."""
    return 8 * len(blocks) * model.state_width if carry else 0


def drop_carried(folder: Path) -> None:
    """When the folder is finished."""
    for name in (CARRIED, PART):
        (folder / name).unlink(missing_ok=True)
