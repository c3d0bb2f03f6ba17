"""The stages of `make demo` on the device, on a small made-up text: every perplexity is the processor's."""

import importlib.util
import json
from pathlib import Path

from gpu import commands
from gpu.commands import SMALL
from gpu.part import Outcome, Place

STAGES: tuple[str, ...] = (
    "data prepare", "train", "evaluate", "datastore write", "index build", "knn search", "knn tune", "knn evaluate",
)  # fmt: skip
SETTINGS = [*SMALL, "knn.splits=[valid,test]", "knn.nprobe=16"]
"""All lists are searched: which keys lie in which list may differ where two centroids are equally near."""
APART, OF_BUCKETS = 1e-4, 1e-3
"""Largest relative differences of perplexities. λ by distance is tuned in buckets, whose edges lie between words."""


def run(place: Place) -> Outcome:
    """Both at once, a process each."""
    text = commands.text_of(place.folder)[:1]
    stages = STAGES
    if importlib.util.find_spec("matplotlib"):
        stages = (*STAGES, "report")
    here, there = place.folder / "processor", place.folder / "device"

    def work(run: Path) -> commands.Commands:
        return [[*verb.split(), "demo", *SETTINGS, *text, f"run_dir={run}"] for verb in stages]

    commands.finish(
        *(commands.start(work(run), run.parent / f"{run.name}-words", run == here) for run in (here, there))
    )
    wanted, found = _perplexities(here), _perplexities(there)
    out = Outcome({"stages": len(stages), "perplexities": len(wanted)})
    out.must(len(wanted) > 3 and wanted.keys() == found.keys(), f"perplexities of {len(wanted)} and {len(found)} names")
    apart = {name: abs(found[name] - value) / value for name, value in wanted.items() if name in found}
    out.figures["apart"] = float(f"{max(apart.values(), default=0.0):.2e}")
    for name, value in apart.items():
        most = OF_BUCKETS if "buckets" in name else APART
        out.must(value < most, f"{name} is {found[name]:.4f}, on the processor {wanted[name]:.4f}")
    if "report" in stages:
        out.must((there / "report.html").is_file(), "no report.html")
    return out


def _perplexities(run: Path) -> dict[str, float]:
    return _below(json.loads((run / "results.json").read_text("utf-8")))


def _below(found: object, name: str = "") -> dict[str, float]:
    """Every perplexity of a results.json by its place; not the bounds and differences of resampled words."""
    if isinstance(found, dict) and not name.endswith("bootstrap"):
        return {k: v for key, value in found.items() for k, v in _below(value, f"{name}/{key}").items()}
    return {name: found} if isinstance(found, float) and "perplexity" in name else {}
