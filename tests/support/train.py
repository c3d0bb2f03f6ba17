"""Helpers of the training tests: token files, several trainings in one start of the ranks, results off the disk."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from distlm.config.schema import RunConfig
from distlm.data.prepare import run_prepare
from distlm.runtime.stage import open_stage
from support import TINY, mpirun, write_text
from support.config import config_of

DRIVER = Path(__file__).with_name("drivers") / "train.py"


def tiny_tokens(folder: Path, seed: int = 0) -> Path:
    """Token files of about 4300 training tokens and 64 words; the last training block is a short one."""
    text = write_text(folder / "text", seed=seed)
    tokens = folder / "tokens"
    settings = ["data.source=folder", f"data.text_dir={text}", f"data.tokens_dir={tokens}", "data.max_words=0"]
    with open_stage("prepare", config_of("demo", [*TINY, *settings, f"run_dir={folder / 'prepare'}"])) as stage:
        run_prepare(stage)
    return tokens


def settings(tokens: Path, run: Path, *overrides: str) -> list[str]:
    """Overrides of a tiny training; dropout is on (the recipe's)."""
    dropout = ["model.dropout=0.2", "model.attention_dropout=0.1", "model.softmax_dropout=0.2"]
    return [*TINY, *dropout, "data.source=folder", f"data.tokens_dir={tokens}", f"run_dir={run}", *overrides]


def tiny_config(tokens: Path, run: Path, *overrides: str) -> RunConfig:
    """The same as a configuration."""
    return config_of("demo", settings(tokens, run, *overrides))


def train_all(
    ranks: int, folder: Path, jobs: Sequence[Sequence[str]], check: bool = True, **environment: str
) -> list[dict[str, object]]:
    """Run several trainings one after another in one start of `ranks` ranks (importing takes seconds).

    Each job is a list of overrides. Rank 0's results: the summary, or {"stopped": text} or {"error": text}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listing, results = folder / f"jobs-{ranks}.json", folder / f"results-{ranks}.json"
    listing.write_text(json.dumps([list(job) for job in jobs]), "utf-8")
    mpirun(ranks, [str(DRIVER), str(listing), str(results)], check=check, **environment)
    found: list[dict[str, object]] = json.loads(results.read_text("utf-8"))
    if check:
        assert not [result for result in found if "error" in result], found
    return found


def curve(run: Path, name: str = "train/loss") -> dict[int, float]:
    """Update → value from metrics.jsonl; of two lines for one update the later."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {line["step"]: line[name] for line in lines if line.get(name) is not None}


def newest(run: Path) -> Path:
    """The last checkpoint."""
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def same_end(one: Path, other: Path) -> bool:
    """The last checkpoints are of the same update and hold the same weights and optimizer states, byte for byte."""
    files = ("model.safetensors", "optimizer.safetensors")
    return newest(one).name == newest(other).name and all(
        (newest(one) / name).read_bytes() == (newest(other) / name).read_bytes() for name in files
    )


def relative(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Largest relative difference of two curves over the same updates."""
    assert one.keys() == other.keys() and one
    return max(abs(one[step] - other[step]) / abs(one[step]) for step in one)


def weight_difference(one: Path, other: Path) -> float:
    """Largest difference of two runs' last weights, each parameter relative to its largest entry.

    Adam moves a weight by lr whatever the size of its gradient, so where the gradient is all rounding (the bias of
    the keys: softmax ignores it) the weights wander; those entries, by their second moment, are left out.
    """
    worst = 0.0
    first, second = (load_file(newest(run) / "model.safetensors") for run in (one, other))
    moments: dict[str, Tensor] = load_file(newest(one) / "optimizer.safetensors")
    for name, value in first.items():
        moment = moments.get(f"exp_avg_sq/{name}")
        real = slice(None) if moment is None else moment.sqrt() > 1e-6
        difference = (value - second[name]).abs()[real]
        if difference.numel():
            worst = max(worst, float(difference.max() / value.abs().max()))
    return worst
