"""`distlm evaluate` of a masked language model: perplexity of masked tokens on held-out rows, and use of its memories.

The masks are fixed by the seed, so two models are asked about the same tokens (Kim & Jung, table 2). Rows are dealt to
the ranks in batches; every rank has the whole model.
"""

import math
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from distlm.data.shards.reader import ShardRows
from distlm.memory.usage import UsageCounts
from distlm.models.card import model_fingerprint
from distlm.models.complete import memory_files
from distlm.models.perplexity import perplexity
from distlm.models.plm.config import PlmConfig, PlmRun
from distlm.models.plm.io import load_plm
from distlm.models.plm.measure.finished import open_texts
from distlm.models.plm.measure.validate import masked_batch
from distlm.models.plm.model import Plm
from distlm.models.plm.text.masking import NO_LABEL
from distlm.models.records import ModelCard
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import together
from distlm.runtime.ranks.device import default_device
from distlm.runtime.rundir import code_version
from distlm.runtime.stage import Stage
from distlm.training.finished import RESULT
from distlm.training.memory.measure import measured, staleness_of, use_words
from distlm.training.records import LmModel, LmResults, LmSplit

_TOKENS = 8192
"""Tokens of a batch, about; a result does not depend on it beyond rounding."""


def run_evaluate_plm(stage: Stage) -> dict[str, float]:
    """Perplexity of the masked tokens of the run's valid and test rows, and of the shards of plm.texts; RUN/lm.json.

    Of the newest checkpoint: a masked language model is trained to its end. Returns NAME → perplexity, seconds.
    Raises DistlmError for a model of another kind or tokenizer and for damaged files.
    """
    began, run, config = time.monotonic(), stage.run, stage.config
    assert isinstance(config, PlmRun)
    checkpoint = run.newest_checkpoint()
    model, card = together(stage.comm, lambda: load_plm(checkpoint, default_device()))
    texts = together(stage.comm, lambda: _open(stage, card, str(checkpoint)))
    results = LmResults(
        name=config.name,
        splits={},
        context_rule="masked tokens of whole rows",
        model=LmModel(
            kind=card.kind, parameters=sum(p.numel() for p in model.parameters()), memory_values=model.memory_numbers,
            fingerprint=model_fingerprint(checkpoint), memory_files=memory_files(checkpoint), step=card.step,
            checkpoint=str(checkpoint),
        ),
        staleness=staleness_of(model.memories, card.step or 0),
        mask_seed=config.train.seed,
        mask_share=config.plm.mask_share,
        code=code_version(),
    )  # fmt: skip
    for name, rows in texts.items():
        found = evaluate_rows(stage, model, rows, name)
        results.splits[name] = found
        say(
            f"evaluate: {name}: loss {found.loss_nats:.4f}, ppl {found.perplexity:.3f} of {found.tokens} masked "
            f"tokens{use_words(found)}", stage.comm.rank,
        )  # fmt: skip
    seconds = time.monotonic() - began
    if stage.comm.rank == 0:
        run.metrics.write("evaluate", {STAGE_SECONDS: round(seconds, 3)})
        results.write(run.root / RESULT)
    return {**{name: found.perplexity for name, found in results.splits.items()}, "seconds": round(seconds, 3)}


def _open(stage: Stage, card: ModelCard, whose: str) -> dict[str, ShardRows]:
    """As open_texts. Raises DistlmError also for shards of another tokenizer than the model's (`whose`)."""
    assert isinstance(stage.config, PlmRun)
    texts = open_texts(stage.config, stage.run)
    for rows in texts.values():
        rows.require_tokenizer(card.dictionary, card.vocabulary, whose)
    return texts


def evaluate_rows(stage: Stage, model: Plm, rows: ShardRows, name: str) -> LmSplit:
    """Loss of the masked tokens, and how each memory was used. Collective."""
    size = max(1, _TOKENS // rows.row_tokens)
    batches, comm = math.ceil(len(rows) / size), stage.comm
    total, tokens, text = 0.0, 0, 0
    with ExitStack() as stack:
        used = stack.enter_context(measured(model.memories))
        progress = stack.enter_context(Progress(f"evaluate {name}", batches, "batches", comm.rank))
        for number in range(comm.rank, batches, comm.size):
            numbers = np.arange(number * size, min((number + 1) * size, len(rows)))
            found, count, read = _score(stage, model, rows, numbers)
            total, tokens, text = total + found, tokens + count, text + read
            progress.advance(min(comm.size, batches - number))
    everyone = comm.allgather((total, tokens, text, {layer: usage.counts() for layer, usage in used.items()}))
    total = math.fsum(each[0] for each in everyone)
    tokens, text = (sum(each[place] for each in everyone) for place in (1, 2))
    totals = {layer: UsageCounts.total([each[3][layer] for each in everyone]) for layer in used}
    loss = total / max(tokens, 1)
    return LmSplit(
        tokens=tokens, rows=len(rows), rows_fingerprint=rows.fingerprint, text_tokens=text, loss_nats=loss,
        perplexity=perplexity(loss), memory={str(layer): c.measures() for layer, c in totals.items()},
    )  # fmt: skip


def _score(stage: Stage, model: Plm, rows: ShardRows, numbers: Any) -> tuple[float, int, int]:
    """Σ cross entropy, masked tokens, and tokens whose reads count."""
    seed, plm, device = stage.config.train.seed, stage.config.section(PlmConfig), next(model.parameters()).device
    batch = masked_batch(rows, numbers, seed, plm.mask_share)
    given, wanted, mask, counted = (tensor.to(device) for tensor in batch)
    with torch.no_grad(), model.rows.set(None, mask, counted):
        loss = float(model.loss_sum(model(given), wanted))
    return loss, int((wanted != NO_LABEL).sum()), int(counted.sum())
