"""What writing the datastore costs over the forward pass alone.

Same model, same blocks, shard by shard in turns: the forward passes to the tap with nothing kept, then the whole
write (forward, cast, checks, checksums, files, fsync). The ratio of the two times is the cost.

    python benchmarks/datastore_write.py [--rows 65536] [--width 256] [--layers 4] [--threads 2] [--out FILE.json]
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from shared.clock import Seconds, clock
from shared.command import Benchmark, Options, report, use_threads
from shared.store import settings

from distlm.data.blocks import gather
from distlm.datastore.plan import ShardPlan, StorePlan, plan_store
from distlm.datastore.settings import Settings
from distlm.datastore.writer import write_shard
from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import TransformerLM
from distlm.runtime.ranks.device import default_device, synchronize

TAP = "last_ffn_input"


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(
        __doc__, rows=1024, rows_per_shard=256, width=32, layers=2, vocabulary=13_000, context_window=32, block=32
    )
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--rows-per-shard", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=33280)
    parser.add_argument("--context-window", type=int, default=256)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--batch-blocks", type=int, default=4)
    parser.add_argument("--key-dtype", choices=["float16", "float32"], default="float16")
    parser.add_threads()
    parser.add_argument(
        "--folder", type=Path, help="where the store is written and removed again; default: a temporary"
    )
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    torch.set_num_threads(use_threads(options.threads))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report(measure(options, Path(folder)), options)


def measure(options: Options, folder: Path) -> dict[str, object]:
    """Seconds per shard of each way, interleaved, and their ratios."""
    torch.manual_seed(0)
    model, ids, plan, store = prepare(options)
    ways: dict[str, Callable[[ShardPlan], object]] = {
        "forward, threads share a pass": lambda shard: forward_shared(model, prepared[shard.index]),
        "forward, a pass per thread": lambda shard: forward_parallel(model, prepared[shard.index]),
        "write": lambda shard: write_shard(model, ids, plan, shard, store, folder),
    }
    prepared = {shard.index: inputs_of(model, ids, plan, shard) for shard in plan.shards}
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    names = list(ways)
    for way in ways.values():
        way(plan.shards[0])
    for shard in plan.shards:
        # Another one first each time, so that none always runs on what another left behind.
        for name in names[shard.index % 3 :] + names[: shard.index % 3]:
            start = clock()
            ways[name](shard)
            seconds[name].append(clock() - start)
    totals = {name: np.sum(spent, axis=0) for name, spent in seconds.items()}
    best = min(names[:2], key=lambda name: float(totals[name][0]))
    ratios = [float(after[0] / before[0]) for after, before in zip(seconds["write"], seconds[best], strict=True)]
    of_totals = totals["write"] / totals[best]
    device = next(model.parameters()).device
    return {
        "rows": plan.rows,
        "width": options.width,
        "layers": options.layers,
        "key_dtype": options.key_dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "rows_per_s": {name: round(plan.rows / total[0]) for name, total in totals.items()},
        "baseline": best,
        "ratio_of_totals": round(float(of_totals[0]), 4),
        "ratio_median_of_shards": round(statistics.median(ratios), 4),
        "ratio_of_processor_time": round(float(of_totals[1]), 4),
        "bound": 1.10,
    }


def prepare(options: Options) -> tuple[TransformerLM, np.ndarray, StorePlan, Settings]:
    """A model with random weights, Zipf-like tokens, and the plan of their store."""
    window, block = options.context_window, options.block
    config = TransformerConfig(
        layers=options.layers, width=options.width, heads=4, ffn_width=4 * options.width, cutoffs=[4000, 12000],
        max_positions=window + block,
    )  # fmt: skip
    model = TransformerLM(config, options.vocabulary).to(default_device()).eval()
    draws = np.random.default_rng(0).zipf(1.2, options.rows + window)
    ids = (4 + draws % (options.vocabulary - 4)).astype(np.int32)
    plan = plan_store(len(ids), window, block, options.batch_blocks, options.rows_per_shard)
    return model, ids, plan, settings(options.width, options.vocabulary, plan.rows_per_shard, options.key_dtype)


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
    synchronize(inputs[0].device)


if __name__ == "__main__":
    main()
