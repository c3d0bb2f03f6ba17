"""Helpers of the AWD-LSTM's tests: a tiny training in which NT-ASGD is triggered within a few epochs."""

from collections.abc import Sequence
from pathlib import Path

import torch

from distlm.config.schema import RunConfig
from distlm.data.prepare import run_prepare
from distlm.data.tokens import TokenFiles
from distlm.models.awd_lstm.config import LstmRun
from distlm.models.awd_lstm.model import TAPS
from distlm.models.described import build_model
from distlm.models.io import save_model
from distlm.runtime.files import write_json
from distlm.runtime.rundir import RunDir
from support import write_text
from support.config import config_of, run_of
from support.kinds import readable
from support.knn import in_stage
from support.store import tiny_config
from support.train import settings

LSTM = [
    "model.kind=awd_lstm", "lstm.layers=2", "lstm.width=12", "lstm.hidden_width=16", "lstm.embedding_dropout=0.1",
    "lstm.input_dropout=0.2", "lstm.hidden_dropout=0.2", "lstm.output_dropout=0.2", "lstm.weight_dropout=0.3",
    "awd.batch=8", "awd.bptt=12", "awd.epochs=5", "awd.finetune_epochs=2", "awd.nonmono=1", "awd.valid_batch=4",
    "awd.trigger=masked", "data.pad_to_multiple=8", "data.max_words=0",
    "train.optimizer=nt_asgd", "train.lr=20", "train.clip_norm=0.25", "train.weight_decay=1.2e-6",
    "train.deepspeed=zero0", "train.tap=last_output", "train.save_every=0", "datastore.tap=last_output",
]  # fmt: skip
"""Overrides over those of train_support.settings: about 46 updates in an epoch."""


def lstm_settings(tokens: Path, run: Path, *overrides: str) -> list[str]:
    """Overrides of a tiny AWD-LSTM."""
    return [*readable(settings(tokens, run, *LSTM)), *overrides]


def lstm_config(tokens: Path, run: Path, *overrides: str) -> LstmRun:
    """The same as a configuration."""
    return run_of(LstmRun, config_of("awd-lstm-small", lstm_settings(tokens, run, *overrides)))


UNTRAINED = [
    "model.kind=awd_lstm", "train.optimizer=nt_asgd", "lstm.width=16", "lstm.hidden_width=24", "lstm.layers=2",
    f"datastore.tap={TAPS[-1]}", "datastore.key_dtype=float32",
]  # fmt: skip
"""Overrides over those of support.store.arguments."""


def untrained_lstm(folder: Path, extra: Sequence[str] = UNTRAINED) -> RunConfig:
    """Token files, and a checkpoint of random weights in FOLDER/run, named the best one; `extra` has UNTRAINED."""
    config = tiny_config(folder / "run", write_text(folder / "text"), extra)
    in_stage("prepare", config, run_prepare)
    run = RunDir.of(config)
    dictionary = TokenFiles.open(run.tokens(config)).dictionary
    torch.manual_seed(0)
    checkpoint = run.checkpoint(1)
    model = build_model(run_of(LstmRun, config).lstm, len(dictionary))
    save_model(model, checkpoint, {"dictionary": dictionary.hash, "step": 1})
    write_json(checkpoint / "complete.json", {"step": 1})
    write_json(run.checkpoints / "best.json", {"checkpoint": checkpoint.name, "valid_loss": 1.0})
    return config
