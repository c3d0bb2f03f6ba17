"""A transformer's training step: `distlm train`, and the same model, blocks and optimizer in a loop of plain torch.

Both start from the same weights and have no dropout, whose masks are drawn apart: the perplexities must agree.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from shared.plain_lm import PlainLM
from shared.run import SETTINGS, distlm, training_figures
from torch import Tensor

from distlm.config import load_config
from distlm.data.blocks import gather, training_blocks
from distlm.data.order import rows_for_update
from distlm.data.tokens import TokenFiles
from distlm.models.transformer.config import TransformerRun
from distlm.models.transformer.model import TransformerLM
from distlm.optim.schedule import learning_rate
from distlm.training.objective import Sums
from distlm.training.validate import Validator
from peer.turn import OURS, Place, Side, Turn

PLAIN = "plain torch"
RECIPE, UPDATES, FIRST = "wikitext2-small", 12, 4
"""The first updates are not measured."""
APART = 1e-3
"""Largest relative difference of the perplexities."""


def turns(place: Place) -> Iterator[Turn]:
    """A training of each in every turn."""
    tokens = place.folder / "tokens"
    wanted = [
        "data.source=folder", f"data.text_dir={place.text}", f"data.tokens_dir={tokens}", "launch.ranks=1",
        f"train.updates={UPDATES}", f"train.warmup_updates={FIRST}", f"train.log_every={FIRST}", "train.valid_every=0",
        "train.save_every=0", f"launch.threads={place.threads}", "model.dropout=0", "model.softmax_dropout=0",
    ]  # fmt: skip
    settings = [*SETTINGS, *wanted] if place.quick else wanted
    distlm(["data", "prepare", RECIPE, *settings, f"run_dir={place.folder / 'prepare'}"])
    config = load_config(RECIPE, settings)
    assert isinstance(config, TransformerRun)
    model, train = config.model, config.train
    size = (
        f"recipe {RECIPE}, {model.layers} layers of width {model.width}, {train.blocks_per_update} blocks of "
        f"{train.tokens_per_sample} tokens an update, no dropout; {UPDATES - FIRST} updates a turn"
    )
    each = train.blocks_per_update * train.tokens_per_sample
    for number in range(place.turns):
        folder = place.folder / f"turn-{number}"
        distlm(["train", RECIPE, *settings, f"run_dir={folder}"])
        ours = training_figures(folder)
        mine = Side(each / ours["seconds_per_update"], ours["perplexity"])
        theirs = plain(config, tokens, place.threads)
        apart = abs(theirs.perplexity / mine.perplexity - 1)
        assert apart < APART, f"they do not train the same model: {mine} and {theirs}"
        yield Turn(size, {OURS: mine, PLAIN: theirs})


def plain(config: TransformerRun, tokens: Path, threads: int) -> Side:
    """The loop, in this process."""
    torch.set_num_threads(threads)
    train, files = config.train, TokenFiles.open(tokens)
    torch.manual_seed(train.seed)
    model = PlainLM(config.model, len(files.dictionary))
    torch.manual_seed(train.seed)
    model.take(TransformerLM(config.model, len(files.dictionary)))
    first, second = train.adam_betas
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(first, second), eps=train.adam_eps, weight_decay=train.weight_decay, fused=True
    )
    ids = files.split("train")
    blocks = training_blocks(len(ids), train.tokens_per_sample)
    began, given = 0.0, 0
    for update in range(train.updates):
        if update == FIRST:
            began, given = time.perf_counter(), 0
        rows = rows_for_update(train.seed, update, train.blocks_per_update, len(blocks))
        count = int(blocks.scored[rows].sum())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, update)
        optimizer.zero_grad()
        for start in range(0, len(rows), train.micro_blocks):
            batch = gather(ids, blocks, rows[start : start + train.micro_blocks])
            scored = None if batch.scored.all() else torch.from_numpy(batch.scored)
            loss = model(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets), scored)
            (loss * (float(batch.scored.sum()) / count)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
        given += count
    rate = given / (time.perf_counter() - began)
    model.eval()

    def objective(inputs: Tensor, targets: Tensor, scored: Tensor) -> Sums:
        nats = model(inputs, targets, scored).double() * scored.sum()
        return Sums(nats, torch.zeros(()), torch.zeros(()))

    valid = Validator.in_training(files, train).run_alone(objective, torch.device("cpu"))
    return Side(rate, math.exp(valid.loss))
