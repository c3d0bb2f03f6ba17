"""The AWD-LSTM's training step at the Penn Treebank's size, as `lstm.py` measures it, on real words.

Peers are the best that one writes in plain torch, and what ports of the authors' code do (`shared/plain_lstm.py`). That
all do the same is shown by steps without dropout: masks are drawn apart.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lstm import distlm_step, plain_step
from shared.plain_lstm import PlainLstm, UsualLstm
from shared.run import distlm
from torch import Tensor

from distlm.data.tokens import TokenFiles
from distlm.models.awd_lstm.config import LstmConfig
from distlm.models.awd_lstm.model import FIRST_ID, AwdLstm
from peer.turn import OURS, Place, Side, Turn

BEST, USUAL = "plain torch", "plain torch as ports have it"
WORDS, BATCH, BPTT, STEPS = 10_000, 20, 70, 2
"""STEPS of each side in a turn."""
EQUAL_STEPS, APART = 1, 1e-4
"""Steps without dropout that all sides must take alike: largest relative difference of their perplexities."""
Model = AwdLstm | PlainLstm


def turns(place: Place) -> Iterator[Turn]:
    """Each side goes on with what it has learnt; perplexities are those of `without_dropout`."""
    torch.set_num_threads(place.threads)
    words, batch, bptt = (200, 4, 10) if place.quick else (WORDS, BATCH, BPTT)
    config = LstmConfig(width=16, hidden_width=24) if place.quick else LstmConfig()
    tokens = place.folder / "tokens"
    # </s> and <unk> are two of the words.
    distlm(
        ["data", "prepare", "demo", "data.source=folder", f"data.text_dir={place.text}", f"data.max_words={words - 2}",
         "data.pad_to_multiple=1", f"data.tokens_dir={tokens}", f"run_dir={place.folder / 'prepare'}"]
    )  # fmt: skip
    files = TokenFiles.open(tokens)
    train, valid = (chunks(files, split, batch, bptt) for split in ("train", "valid"))
    vocabulary = len(files.dictionary)
    perplexity = without_dropout(config, vocabulary, train, valid)
    steps = {name: step_of(model, train) for name, model in models(config, vocabulary).items()}
    for step in steps.values():
        step()
    size = (
        f"{vocabulary - FIRST_ID:,} words, widths {config.width} and {config.hidden_width}, batch {batch}, chunks of "
        f"{bptt}; {STEPS} steps a turn"
    )
    for _ in range(place.turns):
        sides = {}
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            sides[name] = Side(STEPS * batch * bptt / (time.perf_counter() - began), perplexity[name])
        yield Turn(size, sides)


def models(config: LstmConfig, vocabulary: int) -> dict[str, Model]:
    """distlm's, and those of the peers with its weights; vocabulary: of the dictionary."""
    torch.manual_seed(1)
    ours = AwdLstm(config, vocabulary)
    kinds = {BEST: PlainLstm, USUAL: UsualLstm}
    return {OURS: ours, **{name: kind(config, vocabulary - FIRST_ID, ours) for name, kind in kinds.items()}}


def step_of(model: Model, train: list[Tensor]) -> Callable[[], None]:
    """A training step with the next chunk, round and round."""
    texts = itertools.cycle(train)
    return distlm_step(model, texts) if isinstance(model, AwdLstm) else plain_step(model, texts)


def without_dropout(config: LstmConfig, vocabulary: int, train: list[Tensor], valid: list[Tensor]) -> dict[str, float]:
    """Perplexity of a chunk of valid after EQUAL_STEPS from the same weights, which is the same for all up to rounding.

    Raises AssertionError where it is not.
    """
    off: dict[str, Any] = {each.name: 0.0 for each in dataclasses.fields(config) if each.name.endswith("dropout")}
    found = {}
    for name, model in models(dataclasses.replace(config, **off), vocabulary).items():
        step = step_of(model, train)
        for _ in range(EQUAL_STEPS):
            step()
        found[name] = math.exp(loss(model, valid[0]))
    for name, value in found.items():
        assert abs(value / found[OURS] - 1) < APART, f"{name} does not train the same model: {found}"
    return found


def chunks(files: TokenFiles, split: str, batch: int, bptt: int) -> list[Tensor]:
    """Consecutive chunks of the split in `batch` columns: int64 [bptt + 1, batch] each, the last id being the next's
    first."""
    ids = torch.from_numpy(np.asarray(files.split(split), np.int64))
    columns = ids[: len(ids) // batch * batch].view(batch, -1).t()
    return [columns[first : first + bptt + 1] for first in range(0, len(columns) - bptt, bptt)]


@torch.no_grad()
def loss(model: Model, text: Tensor) -> float:
    """Mean nats of a chunk from the zero state, without dropout."""
    model.eval()
    states = model.zero_states(text.shape[1])
    if isinstance(model, AwdLstm):
        return float(model.cross_entropy(model.stream(text[:-1], states).dropped, text[1:])) / text[1:].numel()
    scores = model(text[:-1] - FIRST_ID, states)[0]
    return float(F.cross_entropy(scores, (text[1:] - FIRST_ID).flatten()))
