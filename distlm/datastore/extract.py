"""Hidden states of batches of blocks: the keys of the datastore, and the queries of the search."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distlm.data.blocks import Blocks, gather
from distlm.models.language_model import LanguageModel
from distlm.runtime.ranks.device_memory import within_memory
from distlm.runtime.ranks.one_thread import one_thread, one_thread_workers

_SOFTMAX_ROWS = 1024
"""Rows scored at once: bounds the head's logits, [1024, words of band 0] twice."""


class Extracted(NamedTuple):
    """Scored positions of a batch, in block order. n is the number of scored tokens."""

    keys: Tensor
    """fp32 [n, D], on the model's device."""
    targets: Tensor
    """int64 [n], on the CPU: the token at each position."""
    log_probs: Tensor | None
    """fp32 [n], on the model's device: log p(target) of the language model, in nats; None when not asked for."""


@torch.inference_mode()
def hidden_states(
    model: LanguageModel,
    ids: npt.NDArray[np.integer],
    blocks: Blocks,
    indices: npt.ArrayLike,
    tap: str,
    with_log_probs: bool = False,
    before: npt.NDArray[np.float32] | None = None,
) -> Extracted:
    """One forward pass over the blocks `indices` [B] of the tokens `ids` [tokens]; the model is in eval mode.

    `before` fp32 [blocks, S]: the state that a recurrent model has before each block; None: it begins anew.

    Computed in the dtype of the model's weights, fp32. Without log-probabilities the model stops at the tap.
    Raises DistlmError for an unknown tap or a block that is longer than model.max_positions.
    """
    batch = gather(ids, blocks, indices, begins=model.begins, vocabulary=model.vocabulary)
    device = next(model.parameters()).device
    places = np.flatnonzero(batch.scored)
    targets = torch.from_numpy(batch.targets.reshape(-1)[places])
    chosen = _move(torch.from_numpy(places), device)
    carried = {} if before is None else {"before": _move(torch.from_numpy(before[np.asarray(indices)]), device)}
    output = model(_move(torch.from_numpy(batch.inputs), device), tap=tap, stop_at_tap=not with_log_probs, **carried)
    keys = output.tapped.flatten(0, 1).index_select(0, chosen).float()
    if not with_log_probs:
        return Extracted(keys, targets, None)
    hidden, wanted = output.hidden.flatten(0, 1).index_select(0, chosen), _move(targets, device)
    log_probs = [
        model.log_probs(some, of)
        for some, of in zip(hidden.split(_SOFTMAX_ROWS), wanted.split(_SOFTMAX_ROWS), strict=True)
    ]
    return Extracted(keys, targets, torch.cat(log_probs) if log_probs else keys.new_zeros(0))


def batches_of_hidden_states(
    model: LanguageModel,
    ids: npt.NDArray[np.integer],
    blocks: Blocks,
    batches: Iterable[npt.ArrayLike],
    tap: str,
    with_log_probs: bool = False,
    before: npt.NDArray[np.float32] | None = None,
) -> Generator[Extracted, None, None]:
    """`hidden_states` of each batch of block numbers, in order; the same bits whatever the number of threads.

    Products that threads share are summed in another order and differ in the last bits, so on a CPU each pass has one
    thread, and as many passes run at once as torch has threads: memory is that many passes, and their results.
    While the generator is open torch's thread count is 1. Close it when it is left early.
    """
    if next(model.parameters()).device.type != "cpu":
        less = "Lower datastore.batch_blocks (datastore write) or knn.batch_blocks (knn search), blocks of one pass"
        for batch in batches:
            with within_memory("a forward pass", less):
                found = hidden_states(model, ids, blocks, batch, tap, with_log_probs, before)
            yield found
        return
    with one_thread() as threads:
        pool = one_thread_workers(threads, "forward")
        running: deque[Future[Extracted]] = deque()
        try:
            for batch in batches:
                running.append(pool.submit(hidden_states, model, ids, blocks, batch, tap, with_log_probs, before))
                # One more than there are threads, so that none is idle while the caller works on a result.
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; a GPU is not waited for, it may still be computing."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
