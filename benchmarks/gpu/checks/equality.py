"""Losses of 20 updates and the keys of a datastore on the device, beside the same on the processor.

Tolerances: fp32 with TF32 off differs by the order of sums (1e-5 of a loss); with a memory a query between two slots
may read the other one (1e-4), and an LSTM passes its rounding on from token to token (1e-4). Each store is written with
the weights of its own training, and its keys are fp16.
"""

from pathlib import Path

import numpy as np

from gpu import commands
from gpu.commands import MEMORY, SMALL
from gpu.part import Outcome, Place

LSTM = [
    "lstm.layers=2", "lstm.width=32", "lstm.hidden_width=48", "lstm.embedding_dropout=0", "lstm.input_dropout=0",
    "lstm.hidden_dropout=0", "lstm.output_dropout=0", "lstm.weight_dropout=0", "awd.batch=8", "awd.bptt=16",
    "awd.valid_batch=4", "data.source=folder", "data.max_words=0", "train.lr=5", "train.log_every=1",
    "train.save_every=0", "train.max_updates_this_run=20", "launch.ranks=1", "launch.threads=1",
]  # fmt: skip
VARIANTS = {
    "transformer": ("demo", SMALL, 1e-5),
    "memory": ("demo", [*SMALL, *MEMORY], 1e-4),
    "lstm": ("awd-lstm-small", LSTM, 1e-4),
}
"""Name → recipe, settings, largest relative difference of a loss."""
SAME_KEYS, KEYS_APART = 0.95, 2e-3


def run(place: Place) -> Outcome:
    """Both at once, a process each."""
    text = commands.text_of(place.folder)
    prepare = ["data", "prepare", "demo", *SMALL, *text, f"run_dir={place.folder / 'prepare'}"]
    commands.run([prepare], place.folder, on_processor=True)
    here, there = place.folder / "processor", place.folder / "device"
    commands.finish(*(commands.start(_work(folder, text), folder, folder == here) for folder in (here, there)))
    out = Outcome()
    for name, (_, _, most) in VARIANTS.items():
        apart = commands.relative(here / name, there / name)
        out.figures[f"{name}: losses apart"] = float(f"{apart:.2e}")
        out.must(apart < most, f"{name}: losses differ by {apart:.2e}, at most {most:g} is right")
    _compare_keys(out, here / "transformer", there / "transformer")
    return out


def _work(folder: Path, text: list[str]) -> commands.Commands:
    trainings = [
        ["train", recipe, *settings, *text, f"run_dir={folder / name}"]
        for name, (recipe, settings, _) in VARIANTS.items()
    ]
    return [*trainings, ["datastore", "write", "demo", *SMALL, *text, f"run_dir={folder / 'transformer'}"]]


def _compare_keys(out: Outcome, here: Path, there: Path) -> None:
    wanted, found = (np.load(next(run.rglob("keys-00000.npy"))).astype(np.float32) for run in (here, there))
    same = float(np.mean(wanted == found))
    apart = float(np.max(np.abs(wanted - found) / np.maximum(1, np.abs(wanted))))
    out.figures |= {"keys of the same bits": round(same, 4), "keys apart": float(f"{apart:.2e}")}
    out.must(same > SAME_KEYS, f"{same:.1%} of the keys' numbers are the same, {SAME_KEYS:.0%} at least is right")
    out.must(apart < KEYS_APART, f"keys differ by {apart:.2e}, at most {KEYS_APART:g} is right")
