"""A small finished run for --quick, of a model that was hardly trained."""

import sys
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


def finished_run(folder: Path) -> Path:
    """Its run directory in `folder`, with a store, an index and neighbours of `valid`; stages run in this process.

    OMP_NUM_THREADS is 1 afterwards.
    """
    run, text = folder / "run", write_text(folder / "text", sentences=1_000)
    for verb in STAGES:
        words = [*verb.split(), "demo", *SETTINGS, f"data.text_dir={text}", f"run_dir={run}"]
        with redirect_stdout(sys.stderr):
            try:
                main(words)
            except SystemExit as end:
                if end.code:
                    raise
    return run
