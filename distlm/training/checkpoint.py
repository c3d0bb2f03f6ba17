"""Checkpoints in one format for any rank count and ZeRO stage: whole tensors by parameter name, and a few numbers.

CHECKPOINTS/step-NNNNNNNN/
  model.safetensors      fp32 master weights and persistent buffers, model.json describes them (distlm.models.io)
  optimizer.safetensors  "STATE/PARAMETER", e.g. "exp_avg/layers.0.fc1.weight", fp32; empty before the first step.
                         Where the model to be used is an average, that is in model.safetensors and the weights that
                         training goes on from are here, as "weights/PARAMETER"
  hidden.safetensors     hidden states of every column, in the middle of an AWD-LSTM's epoch
  words-*, encoder       .safetensors: queues and momentum encoder (distlm.models.transformer.regularisers.files)
  state.json             update number, data fingerprint, seed, optimizer scalars, loss scale, best validation
  complete.json          bytes and checksum of each file; written last
CHECKPOINTS/best.json    name of the checkpoint with the lowest validation loss

A folder is written under another name, flushed to the disk and renamed, so step-* is always whole.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from distlm.errors import DistlmError
from distlm.models.card import WEIGHTS
from distlm.models.complete import check_files, listing
from distlm.models.io import load_model, save_weights
from distlm.models.kind import Description
from distlm.models.language_model import LanguageModel
from distlm.models.records import Complete
from distlm.models.tensor_file import open_tensors
from distlm.runtime.files import bytes_hash, sweep_temporaries, sync_file, sync_folder
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.records import BestCheckpoint
from distlm.runtime.rundir import RunDir
from distlm.system_errors import AGAIN, reason
from distlm.training.engine import Engine
from distlm.training.finished import STATE
from distlm.training.records import Best, S, TrainState

OPTIMIZER, BEST = "optimizer.safetensors", "best.json"
HIDDEN = "hidden.safetensors"
_RAW = "weights"

_MEANING = {
    "data": "the token files (fingerprint)",
    "dictionary": "the dictionary (hash)",
    "blocks_per_update": "train.blocks_per_update",
    "seed": "train.seed",
}


@dataclass(frozen=True)
class Resume(Generic[S]):
    """The checkpoint a run continues from."""

    folder: Path
    state: S


def save_checkpoint(
    comm: Comm,
    run: RunDir,
    engine: Engine,
    model: Description,
    vocabulary: int,
    state: TrainState,
    keep_last: int,
    average: str | None = None,
    hidden: Mapping[str, Tensor] | None = None,
    write: Callable[[Path], object] | None = None,
) -> Path:
    """Write the checkpoint of `state.update` updates, point best.json at `state.best`, remove old checkpoints: all but
    the newest `keep_last` and the best one of each of those.

    `average` names the optimizer state that is the model to be used, if that is not the weights themselves; `hidden`
    are further tensors of rank 0; `write` puts this rank's further files into the folder.
    Collective. Tensors are gathered one parameter at a time; rank 0 holds at most the weights (4 bytes per parameter)
    or the optimizer states (Adam 8, NAG 4 bytes per parameter) in host memory, the others one tensor.
    Raises DistlmError on every rank when the disk is full, and when the ranks' persistent buffers differ.
    """
    final = run.checkpoint(state.update)
    # The dot keeps it out of every step-* listing, marker or not.
    folder = final.with_name(f".{final.name}.tmp")
    extra = {"dictionary": state.dictionary, "step": state.update, "tap": state.tap}
    state.optimizer = engine.scalars(average)

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    buffers = _buffers(comm, engine)
    _on_rank0(comm, folder, begin)
    tensors = {**_gather(comm, engine, [average], ""), **buffers}
    _on_rank0(comm, folder, partial(save_weights, tensors, model, vocabulary, folder, extra))
    tensors.clear()
    tensors = _gather(comm, engine, [None if key == average else key for key in state.optimizer.keys])
    _on_rank0(comm, folder, partial(safetensors.torch.save_file, tensors, folder / OPTIMIZER))
    tensors.clear()
    if write is not None:
        together(comm, lambda: _guarded(folder, partial(write, folder)))

    def finish() -> None:
        if hidden:
            safetensors.torch.save_file(dict(hidden), folder / HIDDEN)
        state.write(folder / STATE)
        seal(folder, final, state.update)
        point_at_best(run, state.best)
        _remove_old(run, keep_last, type(state))

    _on_rank0(comm, folder, finish)
    return final


def seal(folder: Path, final: Path, step: int) -> None:
    """Flush a written folder, mark it complete and give it its name."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        sync_file(path)
    Complete(step=step, files=listing(files)).write(folder / Complete.NAME)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    sync_folder(final.parent)


def find_resume(run: RunDir, fresh: S, keep_last: int) -> Resume[S] | None:
    """The newest complete checkpoint, after doing what killed or failed saves left to do; None when there is none. Rank
    0 only.

    Raises DistlmError when the checkpoint is damaged, or was made from other data: `fresh` is the state with which this
    run would begin.
    """
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    for unfinished in run.checkpoints.glob(".step-*.tmp"):
        shutil.rmtree(unfinished)
    sweep_temporaries(run.checkpoints)
    for folder in run.checkpoints.glob("step-*"):
        if not (folder / Complete.NAME).exists():
            shutil.rmtree(folder)
    complete = run.complete_checkpoints()
    if not complete:
        return None
    folder = complete[-1]
    check_files(folder, f"delete {folder} to continue from the checkpoint before it")
    state = type(fresh).read(folder / STATE)
    there = state.identity()
    for name, value in fresh.identity().items():
        if there[name] != value:
            raise DistlmError(
                f"{folder}: {_MEANING.get(name, name)} differs: {there[name]!r} there, {value!r} now; continue "
                "with what the checkpoint was made from, or start anew with another run_dir="
            )
    point_at_best(run, state.best)
    _remove_old(run, keep_last, type(state))
    return Resume(folder, state)


def model_to_train(resume: Resume[S]) -> LanguageModel:
    """The model with the weights that training goes on from: the checkpoint's, or those beside its averages."""
    model: LanguageModel = load_model(resume.folder)[0]
    if resume.state.optimizer.average:
        with open_tensors(resume.folder / OPTIMIZER) as file:
            for name, parameter in model.named_parameters():
                parameter.data = file.get_tensor(f"{_RAW}/{name}")
    return model


def restore(engine: Engine, resume: Resume[S], weights: Mapping[str, Tensor]) -> None:
    """Give a fresh engine the optimizer's state and, in half precision, the exact fp32 master weights.

    `weights` are those of `model_to_train`, which the model had before the engine was made. Every rank reads the file.
    """
    optimizer = resume.state.optimizer
    engine.restore_scalars(optimizer)
    if engine.precision != "fp32":
        for name, value in weights.items():
            engine.write(name, value)
    for key in optimizer.keys:
        average = key == optimizer.average
        with open_tensors(resume.folder / (WEIGHTS if average else OPTIMIZER)) as file:
            for name in engine.names:
                engine.write(name, file.get_tensor(name if average else f"{key}/{name}"), key)


def point_at_best(run: RunDir, best: Best | None) -> None:
    """Write best.json unless it says so already."""
    path = run.checkpoints / BEST
    if best is None:
        return
    wanted = BestCheckpoint(checkpoint=best.checkpoint, valid_loss=best.valid_loss)
    if not (path.exists() and BestCheckpoint.read(path) == wanted):
        wanted.write(path)


def _gather(comm: Comm, engine: Engine, keys: Sequence[str | None], prefix: str = "{}/") -> dict[str, Tensor]:
    """Full tensors on rank 0 (key None: the weights), an empty dict elsewhere. Collective."""
    tensors = {}
    for key in keys:
        for name in engine.names:
            value = engine.read(name, key)
            if comm.rank == 0:
                # A copy: what DeepSpeed hands out may share a larger buffer, and safetensors refuses shared memory.
                tensors[prefix.format(key or _RAW) + name] = value.cpu().clone()
    return tensors


def _buffers(comm: Comm, engine: Engine) -> dict[str, Tensor]:
    """The model's persistent buffers, on the CPU. Collective. Raises DistlmError, on every rank, where they follow each
    rank's own tokens: the others could not go on from rank 0's as they were."""
    found = {name: buffer.detach().cpu().contiguous() for name, buffer in engine.buffers().items()}
    bits = {name: bytes_hash(tensor.flatten().view(torch.uint8).numpy().tobytes()) for name, tensor in found.items()}
    # The same names on all ranks.
    everyone = comm.allgather(bits) if bits else []
    if differ := [name for name in bits if any(rank[name] != bits[name] for rank in everyone)]:
        error = DistlmError(
            f"the persistent buffer {differ[0]} is not the same on the {comm.size} ranks: it follows the tokens of "
            "each rank, and a checkpoint has one of it; train this model on one rank, with another run_dir="
        )
        error.shared = True
        raise error
    return found


def _on_rank0(comm: Comm, folder: Path, action: Callable[[], object]) -> None:
    rank0_first(comm, lambda: _guarded(folder, action))


def _guarded(folder: Path, action: Callable[[], object]) -> None:
    try:
        action()
    except (OSError, safetensors.SafetensorError) as error:
        what, mend = reason(error, folder)
        raise DistlmError(
            f"{folder}: the checkpoint could not be written: {what}; the ones before it are whole: {mend or AGAIN}"
        ) from error
    except DistlmError as error:
        if isinstance(error.__cause__, OSError | safetensors.SafetensorError):
            # A file of it has said why.
            raise DistlmError(f"{error} (the checkpoints before it are whole)") from error.__cause__
        raise


def _remove_old(run: RunDir, keep_last: int, kind: type[TrainState]) -> None:
    """Keep the newest ones, and the best one that each of them knows of: a run may have to go on from any of them.

    That is one besides at most: each best one is that of the oldest of them, or newer than that.
    """
    complete = run.complete_checkpoints()
    old = complete[:-keep_last]
    states = [kind.peek(folder / STATE) for folder in complete[-keep_last:]] if old else []
    kept = {state.best.checkpoint for state in states if state is not None and state.best is not None}
    for folder in old:
        if folder.name not in kept:
            # The marker goes first: a half-removed checkpoint is none.
            (folder / Complete.NAME).unlink()
            shutil.rmtree(folder)
