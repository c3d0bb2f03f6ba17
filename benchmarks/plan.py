"""What `distlm plan` predicts for building an index, against what building it takes, at several numbers of rows.

For each number of rows: a datastore of random keys, a calibration, the prediction; then train, add, merge on one rank.

    python benchmarks/plan.py [--rows 250000 1000000 4000000] [--width 256] [--factory IVF2048,PQ64] [--out FILE]
"""

import tempfile
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from shared.command import Benchmark, Options, note, report, use_threads
from shared.store import random_keys, settings, write_store

from distlm.config import load_config
from distlm.index import run_index_add, run_index_merge, run_index_train
from distlm.index.choose.calibrate import AMOUNTS, Amounts, calibrate
from distlm.index.choose.cost import index_costs
from distlm.index.choose.plan import Store
from distlm.index.factory import fit_factory
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.world import single
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage
from distlm.runtime.stop import StopFlag

STAGES = {"index train": run_index_train, "index add": run_index_add, "index merge": run_index_merge}


FEW = Amounts(add_s=0.05, disk_bytes=4 << 20, kmeans_keys=1000, transform_keys=(300, 600))
"""What is measured of the machine with --quick."""


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(__doc__, rows=[3000], width=16, factory="IVF16,PQ4x4", sample=1000, rows_per_shard=1000)
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000, 1_000_000, 4_000_000])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--factory", default="IVF2048,PQ64")
    parser.add_argument("--sample", type=int, default=262_144)
    parser.add_argument("--rows-per-shard", type=int, default=250_000)
    parser.add_argument("--folder", type=Path, help="where stores and indexes lie; default: a temporary")
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    use_threads()
    figures = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            figures.append(compare(options, rows, Path(folder)))
            note(str(figures[-1]))
    report({"builds": figures}, options)


def compare(options: Options, rows: int, folder: Path) -> dict[str, Any]:
    """Predicted and measured seconds and bytes of every stage."""
    store_settings = settings(options.width, 97, options.rows_per_shard)
    write_store(folder / "datastore", rows, store_settings, random_keys(options.width))
    config = load_config(
        "demo",
        [f"run_dir={folder}", f"index.factory={options.factory}", f"index.sample={options.sample}"],
    )
    factory = fit_factory(options.factory, options.width, rows, options.sample)
    store = Store(rows, options.width, ceil(rows / options.rows_per_shard), written=True)
    costs = index_costs(factory, store, calibrate(factory, folder, amounts=FEW if options.quick else AMOUNTS), 1)
    run = RunDir.of(config)
    run.open_stage(config, "index")
    stage = Stage("index", config, single({}), SingleComm(), StopFlag(), run)
    result: dict[str, Any] = {"rows": rows, "factory": factory.used}
    files = {"index train": "template.index", "index add": "parts/*.index", "index merge": "merged.index"}
    total = [0.0, 0.0]
    for cost in costs:
        took = STAGES[cost.stage](stage)["seconds"]
        held = sum(path.stat().st_size for path in run.index.glob(files[cost.stage]))
        total = [total[0] + cost.seconds, total[1] + took]
        result[cost.stage] = {
            "predicted_s": round(cost.seconds, 1), "measured_s": round(took, 1),
            "predicted_over_measured": round(cost.seconds / took, 2),
            "bytes_predicted_over_measured": round(cost.disk_bytes / held, 3),
        }  # fmt: skip
    result["whole"] = {"predicted_s": round(total[0], 1), "measured_s": round(total[1], 1),
                       "predicted_over_measured": round(total[0] / total[1], 2)}  # fmt: skip
    return result


if __name__ == "__main__":
    main()
