"""A product-key memory layer, forward, backward and update, side by side with the ways it is otherwise built.

    python benchmarks/memory.py [--device cuda] [--tokens 1024] [--sub-keys 512] [--width 768] [--steps 5] [--out FILE]

Variants, each in a process of its own, so that peak memory is its own:
  distlm   distlm.memory: ProductKeyMemory, SparseValueOptimizer, torch's Adam for the other parameters
  sparse   Lample et al.'s layer in plain torch (all k² pair sums), nn.EmbeddingBag(sparse=True), torch's SparseAdam
  dense    the same with dense gradients and torch's Adam; dense_fused: its form fused=True
  package  the layer of product-key-memory (layer norm of queries: its batch norm fails here), torch Adam, if installed
All get the same tokens, N(0, 1), another batch each step, the same output gradient, heads, k, widths and slots. The
plain layer is given all heads in one batch, which published code is not.

Then the values alone, on a processor: forward from the slots that fresh keys find, backward with the gradient of the
weights, and update, all in one process and in turns, so that a noisy machine slows all of them:
  distlm, distlm_bf16    Adam, its moments in fp32 or bf16
  sparse                 nn.EmbeddingBag(sparse=True) and torch's SparseAdam
  fbgemm_…               FBGEMM's table-batched embeddings, which update in the backward: Adagrad, row-wise Adagrad (one
                         number of state a row) and SGD in fp32, row-wise Adagrad with values in fp16; left out with a
                         line where fbgemm-gpu-cpu is not installed
Then the optimizer step alone on 262,144 and on 1,048,576 slots, the same number of slots being read (--step-tokens),
with moments in --moments, and which share of the table and its moments lies in huge pages. Times are medians, seconds
of processor those of all threads; the first steps are not counted.

Then the lookup alone (the forward from slots and weights to outputs), --calls times in a row: the bytes it moves over
its time, as a share of what a copy of --copy-mib moves on the same device. See `lookup` for what is counted.

All is fp32 (TF32 off, torch's default). With --device cuda the clock waits for the device at the end of each phase, and
the peak is that of torch's allocator, not of the process; torch's Adam is then its foreach form unless it is fused.
"""

import importlib.util
import json
import math
import statistics
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from shared import fbgemm, process
from shared.clock import Seconds, clock, peak
from shared.command import Benchmark, Options, note, report, use_threads
from torch import Tensor, nn

from distlm.memory.config import MemoryConfig
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.pages import huge_share
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.optimizer import SparseValueOptimizer
from distlm.memory.values.table import ValueTable
from distlm.runtime.ranks.device import accelerator

VARIANTS = ("distlm", "sparse", "dense", "dense_fused", "package")
VALUES = ("distlm", "distlm_bf16", "sparse", *fbgemm.FORMS)
PHASES = ("forward", "backward", "update")
LR, VALUES_LR = 1e-4, 1e-3
WARM_UP = 2


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(
        __doc__, tokens=32, sub_keys=16, width=16, heads=2, k=4, key_width=8, steps=2, step_tokens=8,
        step_sub_keys=[16], calls=2, copy_mib=1, variants=["distlm", "sparse", "dense_fused", "package"],
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, or the accelerator that torch sees: cuda, xpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--sub-keys", type=int, default=512, help="n; the memory has n² slots")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--key-width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--step-tokens", type=int, default=512, help="tokens of the optimizer step; 0: leave it out")
    parser.add_argument("--step-sub-keys", type=int, nargs="+", default=[512, 1024], help="n of the optimizer step")
    parser.add_argument("--moments", choices=("fp32", "bf16"), default="fp32", help="of the optimizer step")
    parser.add_argument("--calls", type=int, default=10, help="lookups between two looks at the clock; 0: leave it out")
    parser.add_argument("--copy-mib", type=int, default=1024, help="size of the copy beside the lookup")
    parser.add_threads()
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--values", nargs="*", default=list(VALUES), choices=VALUES, help="variants of the values alone"
    )
    parser.add_argument("--only", help=SUPPRESS)
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    options.threads = use_threads(options.threads)
    found = accelerator()
    if options.device != "cpu" and (found is None or found.type != options.device):
        parser().error(f"--device {options.device}: torch sees {found.type if found else 'no accelerator'} here")
    if options.only:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        alone_only = {"step": step_alone, "lookup": lookup, "values": values_alone}
        measured = alone_only[options.only](options) if options.only in alone_only else layer(options, options.only)
        print(json.dumps(measured))
        return
    report(compare(options), options)


def compare(options: Options) -> dict[str, object]:
    """All variants one after the other, and what each takes relative to distlm."""
    layers: dict[str, dict[str, float]] = {}
    left_out = []
    for variant in options.variants:
        if variant == "package" and importlib.util.find_spec("product_key_memory") is None:
            left_out.append("package: product-key-memory is not installed")
            note(f"{left_out[-1]}, left out")
            continue
        layers[variant] = alone(options, variant)
        note(f"{variant}: {layers[variant]}")
    ours = layers.get("distlm")
    times = {
        name: {key: round(figures[key] / ours[key], 2) for key in ("seconds", "cpu_seconds", "peak_gb")}
        for name, figures in layers.items()
        if ours and name != "distlm"
    }
    values: dict[str, Any] = {}
    if options.values and options.device == "cpu":
        if not fbgemm.available():
            left_out.append(f"fbgemm: {fbgemm.MISSING}")
            note(f"{left_out[-1]}, left out")
        values = alone(options, "values")
        note(f"values: {values}")
    found = alone(options, "lookup") if options.calls else {}
    note(f"lookup: {found}")
    steps: dict[str, object] = {}
    if options.step_tokens:
        for sub_keys in options.step_sub_keys:
            steps[str(sub_keys**2)] = alone(options, "step", sub_keys=sub_keys)
            note(f"step on {sub_keys**2} slots: {steps[str(sub_keys**2)]}")
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "tokens": options.tokens, "width": options.width, "threads": options.threads, "torch": torch.__version__,
        "left_out": left_out, "layers": layers,
        "times_as_much_as_distlm": times, "values": values, "lookup": found, "step": steps,
    }  # fmt: skip


def alone(options: Options, what: str, **changed: int) -> dict[str, Any]:
    """One variant in its own process, with some options changed."""
    names = (
        "device", "tokens", "sub_keys", "width", "heads", "k", "key_width", "steps", "step_tokens", "calls", "copy_mib",
        "threads", "moments",
    )  # fmt: skip
    values = [f"--{name.replace('_', '-')}={changed.get(name, getattr(options, name))}" for name in names]
    words = [*values, "--only", what, "--values", *options.values]
    figures: dict[str, Any] = process.result(process.start(__file__, words, options.threads))
    return figures


def layer(options: Options, variant: str) -> dict[str, float]:
    """Forward, backward and update of one layer."""
    run, update = build(options, variant)
    device = options.device
    upstream = torch.randn(options.tokens, options.width, generator=torch.Generator().manual_seed(1)).to(device)
    clocks: dict[str, list[Seconds]] = {phase: [] for phase in PHASES}
    for step in range(WARM_UP + options.steps):
        x = torch.randn(options.tokens, options.width, generator=torch.Generator().manual_seed(2 + step)).to(device)
        x.requires_grad_()
        before = clock(device)
        for phase in PHASES:
            if phase == "forward":
                out = run(x)
            elif phase == "backward":
                out.backward(upstream)
            else:
                update()
            now = clock(device)
            if step >= WARM_UP:
                clocks[phase].append(now - before)
            before = now
    figures = {}
    for i, name in enumerate(("seconds", "cpu_seconds")):
        seconds = {phase: [float(step[i]) for step in clocks[phase]] for phase in PHASES}
        figures[name] = round(statistics.median(map(sum, zip(*seconds.values(), strict=True))), 6)
        for phase in PHASES:
            figures[f"{phase}_{name}"] = round(statistics.median(seconds[phase]), 6)
    return figures | {"peak_gb": peak(device)}


def build(options: Options, variant: str) -> tuple[Callable[[Tensor], Tensor], Callable[[], object]]:
    """(forward [T, D] → [T, D], update)."""
    model: nn.Module
    if variant == "distlm":
        config = memory_config(options)
        model = ProductKeyMemory.of(config, options.width, 1, 0, Exchange.alone()).to(options.device)
        rest = torch.optim.Adam(model.parameters(), lr=LR)
        values = SparseValueOptimizer.of(config, [model.table])

        def update() -> None:
            rest.step()
            rest.zero_grad()
            values.update()

        return lambda x: model(x[None])[0], update
    if variant == "package":
        from product_key_memory import PKM  # type: ignore[import-not-found]

        model = PKM(
            options.width, heads=options.heads, num_keys=options.sub_keys, topk=options.k,
            dim_head=options.key_width // 2,
        )  # fmt: skip
    else:
        model = PaperMemory(options, sparse=variant == "sparse")
    model.to(options.device)
    table = [model.get_parameter("values.weight")]
    others = [parameter for parameter in model.parameters() if parameter is not table[0]]
    optimizers: list[torch.optim.Optimizer]
    if variant == "sparse":
        optimizers = [torch.optim.Adam(others, lr=LR), torch.optim.SparseAdam(table, lr=VALUES_LR)]
    else:
        groups: list[dict[str, Any]] = [{"params": others}, {"params": table, "lr": VALUES_LR}]
        optimizers = [torch.optim.Adam(groups, lr=LR, fused=variant == "dense_fused" or None)]

    def update_all() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return (lambda x: model(x[None])[0]), update_all


class PaperMemory(nn.Module):
    """Lample et al. 2019, §3: query network with batch norm, two half-key products, top k of each, k² sums, top k."""

    def __init__(self, options: Options, sparse: bool) -> None:
        super().__init__()
        self.heads, self.n, self.k, half = options.heads, options.sub_keys, options.k, options.key_width // 2
        self.query = nn.Linear(options.width, self.heads * options.key_width)
        self.norm = nn.BatchNorm1d(self.heads * options.key_width)
        self.keys = nn.Parameter(torch.empty(self.heads, 2, self.n, half).uniform_(-(half**-0.5), half**-0.5))
        self.values = nn.EmbeddingBag(self.n**2, options.width, mode="sum", sparse=sparse)
        nn.init.normal_(self.values.weight, std=options.width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] → [B, T, D]."""
        queries = self.norm(self.query(x.flatten(0, 1))).view(-1, self.heads, 2, self.keys.shape[3])
        halves = torch.einsum("thsd,hsnd->thsn", queries, self.keys)
        scores, ids = halves.topk(self.k, dim=3)
        sums = (scores[:, :, 0, :, None] + scores[:, :, 1, None]).flatten(2)
        slots = (ids[:, :, 0, :, None] * self.n + ids[:, :, 1, None]).flatten(2)
        best, places = sums.topk(self.k, dim=2)
        out: Tensor = self.values(slots.gather(2, places).flatten(1), per_sample_weights=best.softmax(2).flatten(1))
        return out.view_as(x)


def step_alone(options: Options) -> dict[str, float | None]:
    """The update of a table of which the same number of slots is read, whatever its size, twice each."""
    reads = options.heads * options.k
    rows = options.step_tokens * reads // 2
    device = options.device
    config = replace(memory_config(options), moments=options.moments, values="zero")
    table = ValueTable(config, options.width, 1, 0, Exchange.alone()).to(device)
    optimizer = SparseValueOptimizer.of(table.config, [table])
    found = []
    for step in range(WARM_UP + options.steps):
        random = torch.Generator().manual_seed(step)
        slots = torch.randperm(options.sub_keys**2, generator=random)[:rows].repeat(2).int()
        slots = slots[torch.randperm(2 * rows, generator=random)].view(-1, reads)
        weights = torch.rand(slots.shape, generator=random)
        gradient = torch.randn(len(slots), options.width, generator=random)
        # Touch all planes first: a page is made on its first write, which is no part of an update.
        if step == 0:
            table.make_moments()
            for plane in table.planes():
                plane.zero_()
        table.gradient.add(slots.to(device), weights.to(device), gradient.to(device))
        before = clock(device)
        assert optimizer.update().rows == [rows]
        found.append(clock(device) - before)
    wall, cpu = (statistics.median(float(step[i]) for step in found[WARM_UP:]) for i in range(2))
    share = huge_share(table.planes())
    return {
        "rows": rows, "seconds": round(wall, 6), "cpu_seconds": round(cpu, 6), "peak_gb": peak(device),
        "huge_pages": None if math.isnan(share) else round(share, 3),
    }  # fmt: skip


def values_alone(options: Options) -> dict[str, dict[str, float]]:
    """Forward, backward and update of the values, without keys, by each of --values in turns."""
    memory = ProductKeyMemory.of(memory_config(options), options.width, 1, 0, Exchange.alone())
    works = {name: values_work(options, name) for name in options.values if name[:6] != "fbgemm" or fbgemm.available()}
    clocks: dict[str, list[list[Seconds]]] = {name: [] for name in works}
    for step in range(WARM_UP + options.steps):
        random = torch.Generator().manual_seed(2 + step)
        with torch.no_grad():
            x = torch.randn(options.tokens, options.width, generator=random)
            slots, scores = memory.retrieval(x, torch.ones(options.tokens, dtype=torch.bool))
        slots, weights = slots.flatten(1), scores.softmax(2).flatten(1)
        upstream = torch.randn(options.tokens, options.width, generator=random)
        for name, (forward, update) in works.items():
            of_weights = weights.clone().requires_grad_()
            times = [clock()]
            out = forward(slots, of_weights)
            times.append(clock())
            out.backward(upstream)
            update()
            times.append(clock())
            if step >= WARM_UP:
                clocks[name].append([times[1] - times[0], times[2] - times[1]])
    found = {}
    for name, steps in clocks.items():
        of = [[statistics.median(float(step[phase][i]) for step in steps) for i in range(2)] for phase in range(2)]
        found[name] = {
            "forward_seconds": round(of[0][0], 6), "backward_and_update_seconds": round(of[1][0], 6),
            "seconds": round(of[0][0] + of[1][0], 6), "cpu_seconds": round(of[0][1] + of[1][1], 6),
        }  # fmt: skip
    for name, figures in found.items():
        ours = found.get("distlm")
        if ours and name != "distlm":
            figures["times_as_much_as_distlm"] = round(figures["cpu_seconds"] / ours["cpu_seconds"], 2)
    return found


def values_work(options: Options, name: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], object]]:
    """(forward of slots int32 [T, A] and weights [T, A] → [T, D], update after the backward)."""
    slots = options.sub_keys**2
    if name.startswith("distlm"):
        config = replace(memory_config(options), moments="bf16" if name == "distlm_bf16" else "fp32")
        table = ValueTable(config, options.width, 1, 0, Exchange.alone())
        return lambda s, w: table(s, w, torch.float32), SparseValueOptimizer.of(config, [table]).update
    if name == "sparse":
        bag = nn.EmbeddingBag(slots, options.width, mode="sum", sparse=True)
        adam = torch.optim.SparseAdam(bag.parameters(), lr=VALUES_LR)

        def update() -> None:
            adam.step()
            adam.zero_grad()

        return lambda s, w: bag(s, per_sample_weights=w), update
    return fbgemm.Values(name, slots, options.width, VALUES_LR), lambda: None


@torch.no_grad()
def lookup(options: Options) -> dict[str, float]:
    """The weighted sums of the slots that fresh keys find for N(0, 1) tokens, beside a copy on the same device.

    Shares are of the bytes a second that the copy reads and writes. The same lookup is made again and again: its rows
    must be many times the size of the device's cache, or a share is the cache's.
    """
    device = options.device
    memory = ProductKeyMemory.of(memory_config(options), options.width, 1, 0, Exchange.alone()).to(device)
    x = torch.randn(options.tokens, options.width, generator=torch.Generator().manual_seed(2)).to(device)
    slots, scores = memory.retrieval(x, torch.ones(options.tokens, dtype=torch.bool, device=device))
    slots, weights = slots.flatten(1), scores.softmax(2).flatten(1)
    source = torch.ones(options.copy_mib << 18, device=device)
    target = torch.empty_like(source)
    least, most = lookup_bytes(slots, options.width)
    seconds, copy = in_turns([lambda: memory.table.read(slots, weights), lambda: target.copy_(source)], options)
    copied = 2 * source.nbytes / copy
    return {
        "seconds": round(seconds, 6), "bytes_each_row_once": least, "bytes_each_read": most,
        "copy_gb_per_s": round(copied / 1e9, 2), "gb_per_s_each_read": round(most / seconds / 1e9, 2),
        "share_of_copy_each_row_once": round(least / seconds / copied, 3),
        "share_of_copy_each_read": round(most / seconds / copied, 3),
    }  # fmt: skip


def lookup_bytes(slots: Tensor, width: int) -> tuple[int, int]:
    """Bytes that a lookup of slots [T, A] moves: fp32 rows of the table read, and outputs [T, width] written.

    The first counts each distinct slot's row once, the least that any lookup must read; the second the row of every
    read, which is what reaches the memory where no cache serves the repeats. Slots and weights are left out.
    """
    row = 4 * width
    written = len(slots) * row
    return len(slots.unique()) * row + written, slots.numel() * row + written


def in_turns(works: Sequence[Callable[[], object]], options: Options) -> list[float]:
    """Median seconds of one call of each, taken in turns, so that a noisy machine slows all of them.

    --calls calls follow each other without a look at the clock: a single one takes a GPU hardly longer than its launch.
    """
    found: list[list[float]] = [[] for _ in works]
    for _ in range(WARM_UP + options.steps):
        for work, seconds in zip(works, found, strict=True):
            before = clock(options.device)[0]
            for _ in range(options.calls):
                work()
            seconds.append(float(clock(options.device)[0] - before) / options.calls)
    return [statistics.median(seconds[WARM_UP:]) for seconds in found]


def memory_config(options: Options) -> MemoryConfig:
    return MemoryConfig(
        kind="resm", sub_keys=options.sub_keys, heads=options.heads, k=options.k, key_width=options.key_width,
        lr=VALUES_LR,
    )  # fmt: skip


if __name__ == "__main__":
    main()
