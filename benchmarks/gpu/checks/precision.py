"""fp16 with dynamic loss scaling and bf16 on the device, with and without a memory, beside fp32 on the same device."""

import json
from pathlib import Path

from gpu import commands
from gpu.checks.machine import has_bf16
from gpu.commands import MEMORY, SMALL
from gpu.part import Outcome, Place

KINDS = {"": SMALL, "memory: ": [*SMALL, *MEMORY]}
APART = 2e-2
"""Largest relative difference of a loss: numbers of 11 or 8 bits, and a skipped update moves those behind it."""


def run(place: Place) -> Outcome:
    """All trainings in one process."""
    text = commands.text_of(place.folder)
    halves = ["fp16", "bf16"] if has_bf16() else ["fp16"]
    work = [["data", "prepare", "demo", *SMALL, *text, f"run_dir={place.folder / 'prepare'}"]]
    for kind, settings in KINDS.items():
        work += [
            ["train", "demo", *settings, *text, f"train.precision={half}", f"run_dir={_run(place, kind, half)}"]
            for half in ("fp32", *halves)
        ]
    commands.run(work, place.folder)
    out = Outcome() if "bf16" in halves else Outcome({"bf16": "the device has none"})
    for kind in KINDS:
        for half in halves:
            found = _run(place, kind, half)
            apart = commands.relative(_run(place, kind, "fp32"), found)
            out.figures[f"{kind}{half}: losses apart"] = float(f"{apart:.2e}")
            out.must(
                apart < APART, f"{kind}{half}: losses differ from fp32's by {apart:.2e}, at most {APART:g} is right"
            )
        scales = commands.curve(_run(place, kind, "fp16"), "train/loss_scale")
        state = json.loads(next(_run(place, kind, "fp16").glob("checkpoints/step-*/state.json")).read_text("utf-8"))
        out.figures |= {f"{kind}loss scale": scales[max(scales)], f"{kind}skipped updates": state["skipped"]}
        out.must(scales[max(scales)] > 1, f"{kind}fp16: the loss scale fell to {scales[max(scales)]:g}")
    return out


def _run(place: Place, kind: str, half: str) -> Path:
    return place.folder / f"{half}{'-memory' if kind else ''}"
