"""What writing the datastore costs over the forward pass alone.

Same model, same blocks, shard by shard in turns: the forward passes to the tap with nothing kept, then the whole
write (forward, cast, checks, checksums, files, fsync). The ratio of the two times is the cost.

    python benchmarks/datastore_write.py [--rows 65536] [--width 256] [--layers 4] [--threads N] [--out FILE.json]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from distlm.data.blocks import gather
from distlm.datastore.manifest import Settings
from distlm.datastore.plan import ShardPlan, StorePlan, plan_store
from distlm.datastore.writer import write_shard
from distlm.models.device import default_device
from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import TransformerLM

TAP = "last_ffn_input"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--rows-per-shard", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=33280)
    parser.add_argument("--context-window", type=int, default=256)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--batch-blocks", type=int, default=4)
    parser.add_argument("--key-dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument(
        "--folder", type=Path, help="where the store is written and removed again; default: a temporary"
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(options, Path(folder))
    print(json.dumps(figures, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Seconds per shard of each way, interleaved, and their ratios."""
    torch.manual_seed(0)
    model, ids, plan, settings = prepare(options)
    ways: dict[str, Callable[[ShardPlan], object]] = {
        "forward, threads share a pass": lambda shard: forward_shared(model, prepared[shard.index]),
        "forward, a pass per thread": lambda shard: forward_parallel(model, prepared[shard.index]),
        "write": lambda shard: write_shard(model, ids, plan, shard, settings, folder),
    }
    prepared = {shard.index: inputs_of(model, ids, plan, shard) for shard in plan.shards}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor = dict.fromkeys(ways, 0.0)
    names = list(ways)
    for way in ways.values():
        way(plan.shards[0])
    for shard in plan.shards:
        # Another one first each time, so that none always runs on what another left behind.
        for name in names[shard.index % 3 :] + names[: shard.index % 3]:
            start, busy = time.perf_counter(), time.process_time()
            ways[name](shard)
            seconds[name].append(time.perf_counter() - start)
            processor[name] += time.process_time() - busy
    totals = {name: sum(values) for name, values in seconds.items()}
    best = min(names[:2], key=totals.__getitem__)
    ratios = [after / before for after, before in zip(seconds["write"], seconds[best], strict=True)]
    device = next(model.parameters()).device
    return {
        "rows": plan.rows,
        "width": options.width,
        "layers": options.layers,
        "key_dtype": options.key_dtype,
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "rows_per_s": {name: round(plan.rows / total) for name, total in totals.items()},
        "baseline": best,
        "ratio_of_totals": round(totals["write"] / totals[best], 4),
        "ratio_median_of_shards": round(statistics.median(ratios), 4),
        "ratio_of_processor_time": round(processor["write"] / processor[best], 4),
        "bound": 1.10,
    }


def prepare(options: argparse.Namespace) -> tuple[TransformerLM, np.ndarray, StorePlan, Settings]:
    """A model with random weights, Zipf-like tokens, and the plan of their store."""
    length = options.context_window + options.block
    config = TransformerConfig(
        layers=options.layers, width=options.width, heads=4, ffn_width=4 * options.width, cutoffs=[4000, 12000],
        max_positions=length,
    )  # fmt: skip
    model = TransformerLM(config, options.vocabulary).to(default_device()).eval()
    draws = np.random.default_rng(0).zipf(1.2, options.rows + options.context_window)
    ids = (4 + draws % (options.vocabulary - 4)).astype(np.int32)
    plan = plan_store(len(ids), options.context_window, options.block, options.batch_blocks, options.rows_per_shard)
    settings = Settings(
        split="train", tap=TAP, context_window=options.context_window, block=options.block,
        batch_blocks=options.batch_blocks, rows_per_shard=plan.rows_per_shard, key_dtype=options.key_dtype,
        width=options.width, vocabulary=options.vocabulary, model="0", dictionary="0", tokens="0",
    )  # fmt: skip
    return model, ids, plan, settings


def inputs_of(model: TransformerLM, ids: np.ndarray, plan: StorePlan, shard: ShardPlan) -> list[torch.Tensor]:
    """The model's inputs of every batch, gathered before anything is timed."""
    device = next(model.parameters()).device
    return [torch.from_numpy(gather(ids, plan.blocks, batch).inputs).to(device) for batch in plan.batches(shard)]


def one_pass(model: TransformerLM, inputs: torch.Tensor) -> None:
    with torch.inference_mode():
        model(inputs, tap=TAP, stop_at_tap=True)


def forward_shared(model: TransformerLM, inputs: list[torch.Tensor]) -> None:
    """One pass after the other; torch's threads share each product."""
    for batch in inputs:
        one_pass(model, batch)
    finish(inputs)


def forward_parallel(model: TransformerLM, inputs: list[torch.Tensor]) -> None:
    """As many passes at once as there are threads, each on one, as the writer does on a CPU."""
    threads = torch.get_num_threads() if inputs[0].device.type == "cpu" else 1
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda batch: one_pass(model, batch), inputs))
    finish(inputs)
    torch.set_num_threads(threads)


def finish(inputs: list[torch.Tensor]) -> None:
    """Wait for a GPU."""
    if inputs[0].device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
