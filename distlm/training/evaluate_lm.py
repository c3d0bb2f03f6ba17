"""The stage `distlm evaluate`: perplexity of a trained AWD-LSTM that reads each split in one go."""

import math
import time
from typing import Any

import numpy as np

from distlm.data.dictionary import Dictionary
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.awd_lstm import AwdLstm
from distlm.models.card import model_fingerprint
from distlm.models.device import default_device
from distlm.models.io import card_parameters, check_dictionary, load_model
from distlm.runtime.collective import rank0_first
from distlm.runtime.files import write_json
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import say
from distlm.runtime.rundir import code_version
from distlm.runtime.stage import Stage
from distlm.training.finished import RESULT
from distlm.training.stream_loss import stream_loss

RULE = "each split read in one go, the hidden state carried over; every token scored once, </s> and <unk> included"
_CHUNK = 256
"""Tokens in one pass; the result does not depend on it."""


def run_evaluate_lm(stage: Stage) -> dict[str, Any]:
    """Perplexity per word of every split of knn.splits under the best checkpoint; RUN/lm.json.

    The input before a split's first token is </s>. A text read in one go is no work for several ranks: rank 0 works.
    Returns SPLIT → perplexity. Raises DistlmError for a model of another kind or dictionary.
    """
    return rank0_first(stage.comm, lambda: _evaluate(stage))


def _evaluate(stage: Stage) -> dict[str, Any]:
    began, run = time.monotonic(), stage.run
    checkpoint = run.model_checkpoint(stage.config)
    model, card = load_model(checkpoint, default_device())
    tokens = TokenFiles.open(run.tokens(stage.config))
    check_dictionary(card, tokens.dictionary)
    if not isinstance(model, AwdLstm):
        raise DistlmError(
            f"{checkpoint}: a {card['kind']} is evaluated in blocks, by `distlm knn search`, `tune` and `evaluate`; "
            "`distlm evaluate` is for model.kind=awd_lstm"
        )
    splits = {}
    for split in stage.config.knn.splits:
        ids = tokens.split(split)
        column = np.concatenate([[Dictionary.EOS], ids])[None]
        loss = stream_loss(model, column, _CHUNK) / len(ids)
        splits[split] = {"tokens": len(ids), "loss_nats": loss, "perplexity": math.exp(min(loss, 700.0))}
        say(f"evaluate: {split}: loss {loss:.4f}, ppl {splits[split]['perplexity']:.2f} ({RULE})")
    results = {
        "format": 1, "name": stage.config.name, "splits": splits, "context_rule": RULE,
        "model": {
            "kind": card["kind"], "parameters": card_parameters(card), "fingerprint": model_fingerprint(checkpoint),
            "step": card.get("step"), "checkpoint": str(checkpoint),
        },
        "tokens": tokens.fingerprint, "code": code_version(),
    }  # fmt: skip
    seconds = time.monotonic() - began
    run.metrics.write("evaluate", {STAGE_SECONDS: round(seconds, 3)})
    write_json(run.root / RESULT, results)
    return {"seconds": seconds, **{split: result["perplexity"] for split, result in splits.items()}}
