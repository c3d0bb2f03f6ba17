"""The stage `distlm evaluate`: perplexity of a language model without neighbours.

An AWD-LSTM reads each split in one go; a transformer is given blocks, those of `distlm knn search`.
"""

import math
import time
from typing import Any

import numpy as np
from msgspec import to_builtins

from distlm.config.schema import RunConfig
from distlm.data.dictionary import Dictionary
from distlm.data.tokens import TokenFiles
from distlm.models.awd_lstm.model import AwdLstm
from distlm.models.awd_lstm.stream_loss import stream_loss
from distlm.models.card import model_fingerprint
from distlm.models.device import default_device
from distlm.models.io import card_parameters, check_dictionary, load_model
from distlm.models.language_model import LanguageModel
from distlm.runtime.files import write_json
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.rundir import code_version
from distlm.runtime.stage import Stage
from distlm.training.finished import RESULT
from distlm.training.objective import TrainModule
from distlm.training.validate import Validator

RULE = "each split read in one go, the hidden state carried over; every token scored once, </s> and <unk> included"
_CHUNK = 256
"""Tokens in one pass; the result does not depend on it."""


def run_evaluate_lm(stage: Stage) -> dict[str, Any]:
    """Perplexity per word of every split of knn.splits under the best checkpoint; RUN/lm.json.

    The input before a split's first token is </s>. A text read in one go is no work for several ranks: rank 0 works.
    Returns SPLIT → perplexity. Raises DistlmError for a model of another dictionary, and for blocks that are too long.
    """
    return rank0_first(stage.comm, lambda: _evaluate(stage))


def _evaluate(stage: Stage) -> dict[str, Any]:
    began, run = time.monotonic(), stage.run
    checkpoint = run.model_checkpoint(stage.config)
    model, card = load_model(checkpoint, default_device())
    tokens = TokenFiles.open(run.tokens(stage.config))
    check_dictionary(card, tokens.dictionary)
    splits, rule = {}, RULE
    for split in stage.config.knn.splits:
        count = len(tokens.split(split))
        if isinstance(model, AwdLstm):
            loss = _in_one_go(model, tokens, split)
        else:
            loss, rule = _in_blocks(model, tokens, split, stage.config)
        splits[split] = {
            "tokens": count, "loss_nats": loss,
            "perplexity": math.exp(min(loss * tokens.tokens_per_word(split), 700.0)),
        }  # fmt: skip
        if tokens.tokenizer:
            splits[split] |= {"words": tokens.words(split), "token_perplexity": math.exp(min(loss, 700.0))}
        say(f"evaluate: {split}: loss {loss:.4f}, ppl {splits[split]['perplexity']:.2f} ({rule})")
    results = {
        "format": 1, "name": stage.config.name, "splits": splits, "context_rule": rule,
        "model": {
            "kind": card["kind"], "parameters": card_parameters(card), "fingerprint": model_fingerprint(checkpoint),
            "step": card.get("step"), "checkpoint": str(checkpoint),
        },
        "tokens": tokens.fingerprint, "code": to_builtins(code_version()),
    }  # fmt: skip
    seconds = time.monotonic() - began
    run.metrics.write("evaluate", {STAGE_SECONDS: round(seconds, 3)})
    write_json(run.root / RESULT, results)
    return {"seconds": seconds, **{split: result["perplexity"] for split, result in splits.items()}}


def _in_one_go(model: AwdLstm, tokens: TokenFiles, split: str) -> float:
    ids = tokens.split(split)
    return stream_loss(model, np.concatenate([[Dictionary.EOS], ids])[None], _CHUNK) / len(ids)


def _in_blocks(model: LanguageModel, tokens: TokenFiles, split: str, config: RunConfig) -> tuple[float, str]:
    """Nats per token, and the context rule."""
    knn, device = config.knn, next(model.parameters()).device
    validator = Validator(tokens, split, knn.context_window, knn.block, knn.batch_blocks)
    loss = validator.run_alone(TrainModule(model, config.train.tap, 0.0, "mean").eval(), device).loss
    return loss, f"{validator.rule}; every token scored once, </s> and <unk> included"
