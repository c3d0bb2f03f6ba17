"""What `distlm plan` predicts for building an index, against what building it takes, at several numbers of rows.

For each number of rows: a datastore of random keys, a calibration, the prediction; then train, add, merge on one rank.

    python benchmarks/plan.py [--rows 250000 1000000 4000000] [--width 256] [--factory IVF2048,PQ64] [--out FILE]
"""

import argparse
import json
import os
import sys
import tempfile
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from distlm.config import load_config
from distlm.datastore.manifest import MANIFEST, keys_path, values_path
from distlm.datastore.records import Manifest, Shard
from distlm.datastore.settings import Settings
from distlm.index import run_index_add, run_index_merge, run_index_train
from distlm.index.choose.calibrate import calibrate
from distlm.index.choose.cost import index_costs
from distlm.index.choose.plan import Store
from distlm.index.factory import fit_factory
from distlm.index.faiss_module import usable_cores
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.world import single
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage
from distlm.runtime.stop import StopFlag

STAGES = {"index train": run_index_train, "index add": run_index_add, "index merge": run_index_merge}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000, 1_000_000, 4_000_000])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--factory", default="IVF2048,PQ64")
    parser.add_argument("--sample", type=int, default=262_144)
    parser.add_argument("--rows-per-shard", type=int, default=250_000)
    parser.add_argument("--folder", type=Path, help="where stores and indexes lie; default: a temporary")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(usable_cores())
    figures = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            figures.append(compare(options, rows, Path(folder)))
            print(json.dumps(figures[-1]), file=sys.stderr, flush=True)
    print(json.dumps(figures, indent=1))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


def compare(options: argparse.Namespace, rows: int, folder: Path) -> dict[str, Any]:
    """Predicted and measured seconds and bytes of every stage."""
    write_store(folder / "datastore", rows, options.width, options.rows_per_shard)
    config = load_config(
        "demo",
        [f"run_dir={folder}", f"index.factory={options.factory}", f"index.sample={options.sample}"],
    )
    factory = fit_factory(options.factory, options.width, rows, options.sample)
    store = Store(rows, options.width, ceil(rows / options.rows_per_shard), written=True)
    costs = index_costs(factory, store, calibrate(factory, folder), 1)
    run = RunDir(folder)
    run.open_stage(config, "index")
    stage = Stage("index", config, single({}), SingleComm(), StopFlag(), run)
    result: dict[str, Any] = {"rows": rows, "factory": factory.used}
    files = {"index train": "template.index", "index add": "parts/*.index", "index merge": "merged.index"}
    total = [0.0, 0.0]
    for cost in costs:
        took = STAGES[cost.stage](stage)["seconds"]
        held = sum(path.stat().st_size for path in (folder / "index").glob(files[cost.stage]))
        total = [total[0] + cost.seconds, total[1] + took]
        result[cost.stage] = {
            "predicted_s": round(cost.seconds, 1), "measured_s": round(took, 1),
            "predicted_over_measured": round(cost.seconds / took, 2),
            "bytes_predicted_over_measured": round(cost.disk_bytes / held, 3),
        }  # fmt: skip
    result["whole"] = {"predicted_s": round(total[0], 1), "measured_s": round(total[1], 1),
                       "predicted_over_measured": round(total[0] / total[1], 2)}  # fmt: skip
    return result


def write_store(folder: Path, rows: int, width: int, rows_per_shard: int) -> None:
    """Random keys fp16; their checksums are not looked at."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    settings = Settings(
        split="train", tap="last_ffn_input", context_window=8, block=1, batch_blocks=1, rows_per_shard=rows_per_shard,
        key_dtype="float16", width=width, vocabulary=97, model="m" * 32, dictionary="d" * 32, tokens="t" * 32,
    )  # fmt: skip
    shards = []
    for index, first in enumerate(range(0, rows, rows_per_shard)):
        count = min(rows_per_shard, rows - first)
        np.save(keys_path(folder, index), random.standard_normal((count, width), np.float32).astype(np.float16))
        np.save(values_path(folder, index), np.zeros(count, np.int32))
        shards.append(Shard(index, first, count, first + 8, first + 8 + count, "0" * 32, "0" * 32))
    Manifest.of_store(settings, rows, shards, complete=True).write(folder / MANIFEST)


if __name__ == "__main__":
    main()
