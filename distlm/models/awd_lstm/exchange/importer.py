"""`distlm import awd-lstm`: a model that others trained becomes the first checkpoint of a run."""

import argparse
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from distlm.data.corpus import open_corpus
from distlm.data.tokens import SPLITS, TokenFiles
from distlm.errors import DistlmError
from distlm.models.awd_lstm.bptt import columns_of
from distlm.models.awd_lstm.config import LstmRun
from distlm.models.awd_lstm.exchange.state_dict import (
    check_sizes,
    check_vocabulary,
    first_seen,
    in_our_order,
    our_names,
    read_state_dict,
)
from distlm.models.awd_lstm.records import LstmState
from distlm.models.awd_lstm.stream_loss import stream_loss
from distlm.models.io import load_model
from distlm.runtime.rundir import RunDir
from distlm.system_errors import refuse
from distlm.training.records import fresh_state
from distlm.training.start.imported import refuse_trained, write_first_checkpoint


def import_options(config: LstmRun, options: argparse.Namespace) -> dict[str, object]:
    """As the command line gives them: --weights, --vocabulary."""
    words = Path(options.vocabulary) if options.vocabulary else None
    return import_awd_lstm(config, Path(options.weights), words)


def import_awd_lstm(config: LstmRun, path: Path, words: Path | None) -> dict[str, object]:
    """Write the state dict of `path` as checkpoint step-00000000 and the best one, with its loss on the valid split.

    `words`: one word per line, in the order of the embedding's rows; without it the order in which words first come in
    train, valid and test, which is salesforce's. `distlm train` then goes on from these weights.
    Raises DistlmError for what distlm.models.awd_lstm.exchange.state_dict refuses, and when the run has checkpoints.
    """
    run = RunDir.of(config)
    refuse_trained(run)
    tokens = TokenFiles.open(run.tokens(config))
    tensors = read_state_dict(path)
    check_vocabulary(tensors, tokens.dictionary, path)
    weights = our_names(tensors, path)
    check_sizes(weights, config.lstm, path)
    if words is None:
        corpus = open_corpus(config.data)
        vocabulary = first_seen(chain.from_iterable(corpus.read(split) for split in SPLITS))
        source = "the text in order of appearance"
    else:
        vocabulary, source = _read_words(words), str(words)
    weights = in_our_order(weights, vocabulary, tokens.dictionary, path, source)
    state = fresh_state(
        LstmState, tokens.fingerprint, tokens.dictionary.hash, config.train, 1, config.train.tap,
        lstm=config.lstm, awd=config.awd,
    )  # fmt: skip
    return write_first_checkpoint(
        config, tokens, config.lstm, weights, str(path), state, lambda folder: _valid_loss(config, tokens, folder)
    )


def _valid_loss(config: LstmRun, tokens: TokenFiles, folder: Path) -> float:
    model: Any = load_model(folder)[0]
    columns = columns_of(tokens.split("valid"), config.awd.valid_batch, "awd.valid_batch", "valid")
    with torch.inference_mode():
        return stream_loss(model, columns, config.awd.bptt) / (columns.shape[0] * (columns.shape[1] - 1))


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        refuse(error, path)
        raise DistlmError(f"{path}: no list of words, one per line: {error}") from error
