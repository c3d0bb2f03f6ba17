"""A run directory that is ready for the datastore: token files and a model with random weights, without training."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from distlm.config.schema import RunConfig
from distlm.data.prepare import run_prepare
from distlm.data.tokens import TokenFiles
from distlm.models.complete import listing
from distlm.models.io import save_model
from distlm.models.records import Complete
from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import DecoderLayer, TransformerLM
from distlm.runtime.lock import is_lock
from distlm.runtime.records import BestCheckpoint
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import open_stage
from distlm.runtime.units.rounds import rounds
from support import TINY, write_text
from support.config import config_of
from support.kinds import readable, recipe_of


def arguments(run_dir: Path, text: Path, extra: Sequence[str] = ()) -> list[str]:
    """`RECIPE key=value …` of a tiny run."""
    words = [*TINY, f"run_dir={run_dir}", "data.source=folder", f"data.text_dir={text}", *extra]
    return [recipe_of(words), *readable(words)]


def tiny_config(run_dir: Path, text: Path, extra: Sequence[str] = ()) -> RunConfig:
    """The configuration those arguments resolve to."""
    recipe, *overrides = arguments(run_dir, text, extra)
    return config_of(recipe, overrides)


def ready_run(
    folder: Path, lines: int = 400, seed: int = 0, extra: Sequence[str] = (), key_scale: float = 1.0
) -> RunConfig:
    """Token files of `lines` lines and a checkpoint in FOLDER/run. `key_scale` multiplies the last layer norm."""
    text = write_text(folder / "text", train_lines=lines)
    config = tiny_config(folder / "run", text, extra)
    with open_stage("prepare", config) as stage:
        run_prepare(stage)
    add_checkpoint(config, seed, key_scale)
    return config


def add_checkpoint(config: RunConfig, seed: int = 0, key_scale: float = 1.0, step: int = 12) -> Path:
    """A complete checkpoint with random weights, named the best one."""
    run = RunDir.of(config)
    dictionary = TokenFiles.open(run.tokens(config)).dictionary
    torch.manual_seed(seed)
    model = TransformerLM(config.section(TransformerConfig), len(dictionary))
    last = model.layers[-1]
    assert isinstance(last, DecoderLayer)
    with torch.no_grad():
        last.ffn_norm.weight.mul_(key_scale)
    folder = run.checkpoint(step)
    save_model(model, folder, {"dictionary": dictionary.hash, "step": step})
    Complete(files=listing(sorted(folder.iterdir())), step=step).write(folder / "complete.json")
    BestCheckpoint(checkpoint=folder.name, valid_loss=1.0).write(run.checkpoints / "best.json")
    return folder


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path; a killed owner's locks are no results."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not is_lock(path)
    }


def rounds_of(
    units: int, stage: Any, label: str, pending: Any, act: Callable[[Any], Any], _at_once: int = 1
) -> Iterator[Any]:
    """As runtime.units.rounds.rounds, the first of so many units."""
    return rounds(stage, label, pending, act, units)
