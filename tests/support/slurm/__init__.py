"""Helpers of the tests on the real Slurm: the sbatch scripts, a tiny run for them, its record and its files."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from support import TINY, write_text
from support.slurm.cluster import Slurm

SCRIPTS = Path(__file__).parents[3] / "slurm"
FLAGS = ("--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=200", "--time=120")
"""What the test cluster's nodes are to the scripts, whose own shape is nodes of four V100."""
LOST_AFTER = "launch.lost_after_s=20"
"""A rank that a busy machine does not run for some seconds is not lost."""
ON_TWO = ("--nodes=2", *FLAGS)
"""Two ranks on two nodes."""

REQUEUED = ": requeued by this batch script"
"""What a script says that puts its job back in the queue."""


def script(stage: str) -> str:
    """The sbatch script of a stage."""
    return str(SCRIPTS / f"{stage}.sbatch")


def recipe(run: Path, text: Path, *more: str) -> list[str]:
    """`RECIPE section.key=value …` of a tiny run."""
    return ["demo", *TINY, "data.source=folder", f"data.text_dir={text}", "data.max_words=0", f"run_dir={run}", *more]


def long_training(run: Path, tokens: Path, *more: str) -> list[str]:
    """The same for a training that takes seconds, so that it can be disturbed."""
    settings = ["train.updates=100", "train.valid_every=0", "train.save_every=40", LOST_AFTER]
    return ["demo", *TINY, "data.source=folder", f"data.tokens_dir={tokens}", f"run_dir={run}", *settings, *more]


def write_corpus(folder: Path) -> Path:
    """The text of these runs."""
    return write_text(folder / "text", train_lines=400)


def logged(run: Path, name: str = "train/loss") -> dict[int, float]:
    """Update → value from metrics.jsonl, also while it is written; of two lines for one update the later."""
    path = run / "metrics.jsonl"
    found = {}
    for text in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if name in line and "step" in line:
            found[line["step"]] = line[name]
    return found


def wait_for_updates(slurm: Slurm, job: str, run: Path, count: int) -> None:
    """Until this start of the training has done `count` updates."""
    before = len(logged(run))
    slurm.until_in(job, lambda: len(logged(run)) >= before + count, f"{count} updates")


def repeated(run: Path) -> set[int]:
    """Updates that more than one start did."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    return {step for step in steps if steps.count(step) > 1}


def rank_process(run: Path, rank: int) -> tuple[str, int]:
    """Node and process id (on that node) of a rank that is running."""
    newest = max(run.glob(f".alive/*/rank-{rank:05d}.json"), key=os.path.getmtime)
    about = json.loads(newest.read_text("utf-8"))
    return about["node"], about["pid"]


RESULTS = ("tokens", "checkpoints", "datastore", "index", "neighbours", "knn.json")


def outcome(run: Path, names: Sequence[str] = RESULTS) -> dict[str, str]:
    """SHA-256 of the files in these folders of a run, by path; locks and files that hold speeds left out."""
    files = [path for name in names for path in sorted([run / name, *(run / name).rglob("*")]) if path.is_file()]
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.startswith(".") and path.name not in ("state.json", "complete.json")
    }
