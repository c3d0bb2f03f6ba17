"""Tokens a second of training the model of WikiText-103 (247 M parameters) on one device: `distlm train wikitext103`
as it is, beside the same model, blocks and optimizer in a loop of plain torch, in the half precision of the device.

The text is made up: every word of a vocabulary as large as WikiText-103's once, the others by Zipf's law. The share of
the peak is the operations of all matrix products and of attention, counted by torch (attention as if it were not
causal), over the time and over what a large product of two matrices reaches in the same run.
"""

import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from shared.plain_lm import PlainLM
from torch.utils.flop_counter import FlopCounterMode

from distlm.config import load_config
from distlm.data.tokens import TokenFiles
from distlm.models.transformer.config import TransformerRun
from distlm.runtime.ranks.device import default_device, synchronize
from gpu import commands
from gpu.checks.machine import DTYPES, has_bf16
from gpu.part import Outcome, Place
from gpu.peaks import product_rate

GOAL = 1.0
WORDS, DRAWN = 267_740, 1_500_000
UPDATES, BLOCKS, EVERY = 24, 8, 4
PARAMETERS = 246_933_504
"""Of fairseq's transformer_lm_wiki103; a vocabulary of some words more or fewer changes the last digits."""
QUICK = [
    "model.layers=2", "model.width=32", "model.heads=2", "model.ffn_width=64", "model.cutoffs=[60,180]",
    "model.max_positions=64", "train.tokens_per_sample=64", "datastore.context_window=32", "datastore.block=32",
    "knn.context_window=32", "knn.block=32",
]  # fmt: skip
SETTINGS = [
    "data.source=folder", "data.max_words=0", f"train.updates={UPDATES}", f"train.blocks_per_update={BLOCKS}",
    f"train.log_every={EVERY}", "train.valid_every=0", "train.save_every=0", "launch.ranks=1",
]  # fmt: skip


def run(place: Place) -> Outcome:
    """One after the other, so that neither takes the other's device."""
    precision = "bf16" if has_bf16() else "fp16"
    words, drawn, sizes = (300, 6_000, QUICK) if place.quick else (WORDS, DRAWN, [])
    settings = [
        *SETTINGS, *sizes, f"train.precision={precision}", f"data.tokens_dir={place.folder / 'tokens'}",
        f"data.text_dir={_text(place.folder / 'text', words, drawn)}",
    ]  # fmt: skip
    folder = place.folder / "run"
    verbs = (["data", "prepare"], ["train"])
    commands.run([[*verb, "wikitext103", *settings, f"run_dir={folder}"] for verb in verbs], place.folder)
    ours = statistics.median(list(commands.curve(folder, "perf/tokens_per_s").values())[-3:])
    config = load_config("wikitext103", settings)
    assert isinstance(config, TransformerRun)
    plain, operations, parameters = _plain(config, place.folder / "tokens", DTYPES[precision])
    summary = json.loads(next(folder.glob("checkpoints/step-*/state.json")).read_text("utf-8"))
    out = Outcome(
        {"precision": precision, "parameters": parameters, "tokens/s": round(ours), "plain torch": round(plain)}
    )
    mine = summary.get("last", {}).get("parameters", parameters)
    out.must(mine == parameters, f"distlm's model has {mine} parameters, the plain one {parameters}")
    out.must(
        place.quick or abs(parameters / PARAMETERS - 1) < 0.01,
        f"{parameters} parameters; fairseq's model has {PARAMETERS}",
    )
    out.goal("speed over plain torch", ours / plain, least=GOAL)
    peak = product_rate(default_device(), DTYPES[precision], 64 if place.quick else 8192)
    out.figures |= {
        "TFLOP/s": round(ours * operations / 1e12, 1), "peak TFLOP/s": round(peak / 1e12, 1),
        "share of peak": round(ours * operations / peak, 3),
        "plain torch: share of peak": round(plain * operations / peak, 3),
    }  # fmt: skip
    return out


def _text(folder: Path, vocabulary: int, count: int) -> Path:
    """{train,valid,test}.txt in lines of 25 words."""
    folder.mkdir()
    random = np.random.default_rng(0)
    weights = 1 / np.arange(3, vocabulary + 3)
    drawn = random.choice(vocabulary, count, p=weights / weights.sum())
    every = random.permutation(np.concatenate([np.arange(vocabulary), drawn]))
    for split, numbers in (("train", every), ("valid", drawn[:6200]), ("test", drawn[:6200])):
        words = [f"w{number}" for number in numbers.tolist()]
        lines = [" ".join(words[first : first + 25]) for first in range(0, len(words), 25)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def _plain(config: TransformerRun, tokens: Path, dtype: torch.dtype) -> tuple[float, float, int]:
    """Tokens a second; operations of a token, forward and backward; parameters."""
    device, train = default_device(), config.train
    files = TokenFiles.open(tokens)
    torch.manual_seed(1)
    model = PlainLM(config.model, len(files.dictionary)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=train.momentum, nesterov=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    length = train.tokens_per_sample
    ids = torch.from_numpy(np.array(files.split("train")[: BLOCKS * length + 1])).long()
    inputs, targets = (part.view(BLOCKS, length) for part in (ids[:-1], ids[1:]))

    def loss(block: int) -> torch.Tensor:
        given = (part[block : block + 1].to(device) for part in (inputs, targets))
        with torch.autocast(device.type, dtype):
            out: torch.Tensor = model(*given)
        return out / BLOCKS

    def update() -> None:
        optimizer.zero_grad()
        for block in range(BLOCKS):
            scaler.scale(loss(block)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        scaler.step(optimizer)
        scaler.update()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss(0)
    found = []
    for _ in range(UPDATES // EVERY):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(EVERY):
            update()
        synchronize(device)
        found.append(EVERY * BLOCKS * length / (time.perf_counter() - began))
    # A backward pass multiplies twice as much as the forward pass does.
    operations = 3 * counter.get_total_flops() / length
    return statistics.median(found[-3:]), operations, sum(parameter.numel() for parameter in model.parameters())
