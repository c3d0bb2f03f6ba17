"""The lookup of a memory: the weighted sums of the processor, and its share of what a copy moves."""

import memory as benchmark
import torch

from distlm.memory.layer import ProductKeyMemory
from distlm.memory.values.exchange import Exchange
from distlm.runtime.ranks.device import default_device, empty_cache
from gpu.part import Outcome, Place

TOKENS, SUB_KEYS, WIDTH = 8192, 1024, 768
"""On a GPU: 1,048,576 slots of 3 kB, of which a lookup reads most: far more than any cache."""
APART = 1e-5
LAYERS = ("distlm", "sparse", "dense_fused")


def run(place: Place) -> Outcome:
    """Correctness anywhere, speed on a GPU."""
    device = default_device()
    out = Outcome()
    small = benchmark.parser().options(["--quick"])
    apart = _apart(small, device)
    out.figures["sums apart"] = float(f"{apart:.2e}")
    out.must(apart < APART, f"weighted sums differ from the processor's by {apart:.2e}, at most {APART:g} is right")
    if not place.measures:
        return out
    own = ["--quick"] if place.quick else []
    sizes = [] if place.quick else [f"--tokens={TOKENS}", f"--sub-keys={SUB_KEYS}", f"--width={WIDTH}"]
    options = benchmark.parser().options([*own, *sizes, f"--device={device.type}"])
    found = benchmark.lookup(options)
    out.figures |= {
        "lookup ms": round(1000 * found["seconds"], 3), "copy GB/s": found["copy_gb_per_s"],
        "share of copy, each row once": found["share_of_copy_each_row_once"],
        "share of copy, each read": found["share_of_copy_each_read"],
    }  # fmt: skip
    empty_cache()
    # The whole layer with its update, at the benchmark's own size, beside the ways it is otherwise built.
    options = benchmark.parser().options([*own, f"--device={device.type}"])
    seconds = {}
    # The simulated device has no sparse gradients.
    layers = LAYERS if place.device != "sim" else LAYERS[:1]
    for name in layers:
        seconds[name] = benchmark.layer(options, name)["seconds"]
        empty_cache()
    out.figures["layer and update ms"] = round(1000 * seconds["distlm"], 3)
    for name in layers[1:]:
        out.figures[f"layer and update: {name} / distlm"] = round(seconds[name] / seconds["distlm"], 2)
    return out


@torch.no_grad()
def _apart(options: benchmark.Options, device: torch.device) -> float:
    """Largest difference of the sums, relative to the largest sum, for slots and weights that the processor found."""
    torch.manual_seed(0)
    memory = ProductKeyMemory.of(benchmark.memory_config(options), options.width, 1, 0, Exchange.alone())
    x = torch.randn(options.tokens, options.width, generator=torch.Generator().manual_seed(2))
    slots, scores = memory.retrieval(x, torch.ones(options.tokens, dtype=torch.bool))
    slots, weights = slots.flatten(1), scores.softmax(2).flatten(1)
    wanted = memory.table.read(slots, weights)
    found = memory.to(device).table.read(slots.to(device), weights.to(device)).cpu()
    return float((found - wanted).abs().max() / wanted.abs().max())
