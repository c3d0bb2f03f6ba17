"""Runs of distlm in this process: a finished one of a model that was hardly trained, and what a training measured."""

import json
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from distlm.cli import main
from shared.text import write_text

STAGES = ("data prepare", "train", "datastore write", "index build", "knn search")
SETTINGS = [
    "data.source=folder", "data.max_words=0", "model.layers=2", "model.width=32", "model.heads=2", "model.ffn_width=64",
    "model.cutoffs=[200,600]", "model.max_positions=64", "train.tokens_per_sample=64", "train.blocks_per_update=4",
    "train.micro_blocks=4", "train.updates=2", "train.warmup_updates=1", "train.valid_every=0", "train.save_every=0",
    "datastore.context_window=32", "datastore.block=32", "datastore.rows_per_shard=8192", "index.factory=IVF64,PQ4x4",
    "index.sample=4096", "knn.context_window=32", "knn.block=32", "knn.splits=[valid]", "knn.k=64",
    "knn.nprobe=8", "knn.ks=[64]", "launch.ranks=1", "launch.threads=1",
]  # fmt: skip


def finished_run(
    folder: Path, text: Path | None = None, recipe: str = "demo", settings: Sequence[str] = SETTINGS
) -> Path:
    """Its run directory in `folder`, with a store, an index and neighbours of `valid`; stages run in this process.

    text: folder of {train,valid,test}.txt; None: one is made up. OMP_NUM_THREADS is launch.threads afterwards.
    """
    run, text = folder / "run", text or write_text(folder / "text", sentences=1_000)
    for verb in STAGES:
        distlm([*verb.split(), recipe, *settings, f"data.text_dir={text}", f"run_dir={run}"])
    return run


def distlm(words: Sequence[str]) -> None:
    """Run the command in this process; what it prints goes to standard error. Raises SystemExit where it fails."""
    with redirect_stdout(sys.stderr):
        try:
            main(words)
        except SystemExit as end:
            if end.code:
                raise


def training_figures(folder: Path) -> dict[str, float]:
    """Of a training in `folder`, off metrics.jsonl: seconds per update, without those up to the first line, which hold
    the start; and perplexity on valid at the end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    logged = [line for line in lines if "train/loss" in line]
    seconds = (logged[-1]["time"] - logged[0]["time"]) / (logged[-1]["step"] - logged[0]["step"])
    loss = next(line["valid/loss"] for line in reversed(lines) if "valid/loss" in line)
    return {"seconds_per_update": seconds, "perplexity": math.exp(loss)}
