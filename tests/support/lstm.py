"""Helpers of the AWD-LSTM's tests: a tiny training in which NT-ASGD is triggered within a few epochs."""

from pathlib import Path

from distlm.models.awd_lstm.config import LstmRun
from support.config import config_of, run_of
from support.kinds import readable
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
