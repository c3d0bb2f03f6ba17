"""Weights that others trained become the first checkpoint of a run: step-00000000, and the best one."""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import safetensors.torch
from torch import Tensor

from distlm.config.schema import RunConfig
from distlm.config.training import BlocksConfig
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.io import load_model, save_weights
from distlm.models.kind import Description
from distlm.models.language_model import LanguageModel
from distlm.models.perplexity import perplexity
from distlm.models.tensor_file import require_finite
from distlm.runtime.ranks.device import default_device
from distlm.runtime.rundir import RunDir
from distlm.training.checkpoint import OPTIMIZER, point_at_best, seal
from distlm.training.finished import STATE
from distlm.training.memory.objective import objective_of
from distlm.training.records import Best, TrainState, UpdatesState, fresh_state
from distlm.training.validate import Validator


def refuse_trained(run: RunDir) -> None:
    """DistlmError when the run directory has checkpoints."""
    if run.complete_checkpoints():
        raise DistlmError(f"{run.checkpoints}: there are checkpoints already; choose another run_dir=")


def write_first_checkpoint(
    config: RunConfig,
    tokens: TokenFiles,
    model: Description,
    weights: Mapping[str, Tensor],
    source: str,
    state: TrainState,
    valid_loss: Callable[[Path], float],
    buffers: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, object]:
    """Write `weights` (name of named_parameters() → tensor) as a checkpoint from which `distlm train` goes on, with the
    model's kept_buffers, which may be infinite: a bound that binds nothing.

    `source` is what errors and model.json call the origin; `state` that of update 0; `valid_loss` gives the nats per
    token of the written model folder.
    Returns checkpoint, valid_loss and valid_ppl (per word). Raises DistlmError for weights of another model.
    """
    run, size = RunDir.of(config), len(tokens.dictionary)
    require_finite(weights, source)
    final = run.checkpoint(0)
    folder = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    extra = {"dictionary": state.dictionary, "step": 0, "tap": state.tap, "imported_from": Path(source).name}
    try:
        save_weights({**weights, **buffers}, model, size, folder, extra)
    except ValueError as error:
        raise DistlmError(f"{source}: {error}") from error
    safetensors.torch.save_file({}, folder / OPTIMIZER)
    loss = valid_loss(folder)
    if not math.isfinite(loss):
        raise DistlmError(f"{source}: the loss on valid is {loss}: these weights do not fit this text, or are damaged")
    state.best = Best(final.name, loss)
    state.last["valid_loss"] = loss
    state.write(folder / STATE)
    seal(folder, final, 0)
    point_at_best(run, state.best)
    per_word = loss * tokens.tokens_per_word("valid")
    return {"checkpoint": str(final), "valid_loss": loss, "valid_ppl": perplexity(per_word)}


def of_blocks(config: RunConfig, tokens: TokenFiles) -> tuple[TrainState, Callable[[Path], float]]:
    """`state` and `valid_loss` of a model that is trained and validated in blocks of tokens."""
    train = config.section(BlocksConfig)
    state = fresh_state(
        UpdatesState, tokens.fingerprint, tokens.dictionary.hash, train, 1, train.tap,
        blocks_per_update=train.blocks_per_update,
    )  # fmt: skip

    def valid_loss(folder: Path) -> float:
        device = default_device()
        model: LanguageModel = load_model(folder, device)[0]
        objective = objective_of(model, train.tap).eval()
        return Validator.in_training(tokens, train, model.begins).run_alone(objective, device).loss

    return state, valid_loss
