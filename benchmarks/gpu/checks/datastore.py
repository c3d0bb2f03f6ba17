"""Writing the datastore of WikiText-103's model beside its forward pass alone: benchmarks/datastore_write.py there."""

import datastore_write as benchmark

from gpu.part import Outcome, Place

GOAL = 0.95
SIZES = [
    "--rows=49152", "--rows-per-shard=12288", "--width=1024", "--layers=16", "--vocabulary=267744",
    "--context-window=1536", "--block=1536", "--batch-blocks=2",
]  # fmt: skip


def run(place: Place) -> Outcome:
    """Rows a second of the forward pass to the tap, and of the whole write."""
    found = benchmark.measure(benchmark.parser().options(["--quick"] if place.quick else SIZES), place.folder)
    out = Outcome({f"rows/s: {name}": rate for name, rate in found["rows_per_s"].items()})  # type: ignore[attr-defined]
    out.goal("writing over forward alone", 1 / float(found["ratio_of_totals"]), least=GOAL)  # type: ignore[arg-type]
    return out
