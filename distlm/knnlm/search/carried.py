"""The state of a recurrent model before each evaluation block, where a split is read in one go (knn.carry).

One rank reads the split without the softmax and keeps the state at each block's beginning, FOLDER/carried.npy fp32
[blocks, S] until the folder is finished. From there on any rank computes any block, as without `carry`.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from distlm.data.blocks import Blocks, require_ids
from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError, Stopped
from distlm.knnlm.search.forward import Forward
from distlm.models.language_model import LanguageModel
from distlm.runtime.files import atomic_path, load_array, save_array
from distlm.runtime.progress import Progress
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.ranks.one_thread import one_thread
from distlm.runtime.stage import Stage

CARRIED = "carried.npy"
Carried = npt.NDArray[np.float32]


@torch.inference_mode()
def states_before(
    model: LanguageModel,
    ids: npt.NDArray[np.integer],
    blocks: Blocks,
    advance: Callable[[int], None] = lambda blocks: None,
) -> Carried:
    """fp32 [blocks, S]: the state of a recurrent model before each block of the text `ids` [tokens], which is read from
    the zero state; the first input is </s>. `blocks` follow each other without a gap. On a CPU with one thread, so that
    the bits do not follow their number."""
    device = next(model.parameters()).device
    states = torch.zeros(len(blocks), model.state_width, device=device)
    with one_thread():
        for number in range(len(blocks) - 1):
            first, last = int(blocks.start[number]), int(blocks.end[number])
            words = np.array(ids[max(0, first - 1) : last - 1], dtype=np.int64)
            if first == 0:
                words = np.concatenate([[Dictionary.EOS], words])
            require_ids(words, model.vocabulary, first)
            states[number + 1] = model.read(torch.from_numpy(words).to(device), states[number])
            advance(1)
    return states.cpu().numpy()


def make_carried(stage: Stage, forward: Forward, split: str, blocks: Blocks, folder: Path) -> None:
    """Rank 0 writes FOLDER/carried.npy, unless it is there; it is one of the folder's writers. Collective. Raises
    Stopped after a stop signal: it begins anew then."""

    def make() -> None:
        if (folder / CARRIED).exists():
            return
        with Progress(f"read {split} in one go", len(blocks), "blocks") as progress:

            def advance(count: int) -> None:
                progress.advance(count)
                if stage.stop.reason is not None:
                    raise Stopped(f"{folder}: stopped while reading {split} in one go; the same command begins it anew")

            states = states_before(forward.model, forward.tokens.split(split), blocks, advance)
        with atomic_path(folder / CARRIED) as temporary:
            save_array(temporary, states)

    rank0_first(stage.comm, make)


def open_carried(folder: Path) -> Carried:
    """Memory-mapped. Raises DistlmError when the file is missing or cut."""
    try:
        found: Carried = load_array(folder / CARRIED)
    except (OSError, ValueError) as error:
        raise DistlmError(f"{folder / CARRIED}: missing or cut ({error}); remove {folder} and make it again") from error
    return found


def drop_carried(folder: Path) -> None:
    """When the folder is finished."""
    (folder / CARRIED).unlink(missing_ok=True)
