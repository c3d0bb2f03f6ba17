"""The AWD-LSTM's training step at the Penn Treebank's size, as `lstm.py` measures it, on real words.

Peers are the best that one writes in plain torch, and what ports of the authors' code do (`shared/plain_lstm.py`). All
start from the same weights: what they make of the same text differs by the masks that they draw.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator

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

BEST, USUAL = "plain torch, at its best", "plain torch, as ports have it"
WORDS, BATCH, BPTT, STEPS, CHUNKS = 10_000, 20, 70, 3, 2
"""STEPS of each side in a turn; CHUNKS of valid."""
APART = 1e-5
"""Largest relative difference of the losses of the same weights."""


def turns(place: Place) -> Iterator[Turn]:
    """Each side goes on with what it has learnt."""
    torch.set_num_threads(place.threads)
    words, batch, bptt = (200, 4, 10) if place.quick else (WORDS, BATCH, BPTT)
    config = LstmConfig(width=16, hidden_width=24) if place.quick else LstmConfig()
    tokens = place.folder / "tokens"
    distlm(
        ["data", "prepare", "demo", "data.source=folder", f"data.text_dir={place.text}", f"data.max_words={words}",
         "data.pad_to_multiple=1", f"data.tokens_dir={tokens}", f"run_dir={place.folder / 'prepare'}"]
    )  # fmt: skip
    files = TokenFiles.open(tokens)
    train, valid = (chunks(files, split, batch, bptt) for split in ("train", "valid"))
    torch.manual_seed(1)
    ours = AwdLstm(config, len(files.dictionary))
    theirs = {
        BEST: PlainLstm(config, len(files.dictionary) - FIRST_ID, ours),
        USUAL: UsualLstm(config, len(files.dictionary) - FIRST_ID, ours),
    }
    models: dict[str, AwdLstm | PlainLstm] = {OURS: ours, **theirs}
    before = {name: loss(model, valid[:1]) for name, model in models.items()}
    for name, value in before.items():
        assert abs(value / before[OURS] - 1) < APART, f"{name} is not the same model: {before}"
    steps: dict[str, Callable[[], None]] = {OURS: distlm_step(ours, itertools.cycle(train))}
    steps |= {name: plain_step(model, itertools.cycle(train)) for name, model in theirs.items()}
    for step in steps.values():
        step()
    size = (
        f"{len(files.dictionary) - FIRST_ID:,} words, widths {config.width} and {config.hidden_width}, batch {batch}, "
        f"chunks of {bptt}; {STEPS} steps a turn"
    )
    for _ in range(place.turns):
        sides = {}
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            rate = STEPS * batch * bptt / (time.perf_counter() - began)
            sides[name] = Side(rate, math.exp(loss(models[name], valid[:CHUNKS])))
        yield Turn(size, sides)


def chunks(files: TokenFiles, split: str, batch: int, bptt: int) -> list[Tensor]:
    """Consecutive chunks of the split in `batch` columns: int64 [bptt + 1, batch] each, the last id being the next's
    first."""
    ids = torch.from_numpy(np.asarray(files.split(split), np.int64))
    columns = ids[: len(ids) // batch * batch].view(batch, -1).t()
    return [columns[first : first + bptt + 1] for first in range(0, len(columns) - bptt, bptt)]


@torch.no_grad()
def loss(model: AwdLstm | PlainLstm, texts: list[Tensor]) -> float:
    """Mean nats of consecutive chunks, without dropout."""
    model.eval()
    total, states = 0.0, model.zero_states(texts[0].shape[1])
    for text in texts:
        if isinstance(model, AwdLstm):
            out = model.stream(text[:-1], states)
            total, states = total + float(model.cross_entropy(out.dropped, text[1:])), out.states
        else:
            scores, _, _, states = model(text[:-1] - FIRST_ID, states)
            total += float(F.cross_entropy(scores, (text[1:] - FIRST_ID).flatten(), reduction="sum"))
    model.train()
    return total / sum(text[1:].numel() for text in texts)
