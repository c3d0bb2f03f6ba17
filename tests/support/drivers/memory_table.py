"""python memory_table.py FOLDER RANKS ...: a table's updates on each rank of every cut of some rank counts, into
FOLDER/RANKS-COLUMNS-RANK.safetensors (tests/multiprocess/memory/test_memory_table_ranks.py)."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.memory import READS, WIDTH, reads, settings
from support.present import present
from torch import Tensor

from distlm.memory import lookup
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.files import save_table
from distlm.memory.values.optimizer import SparseValueOptimizer
from distlm.memory.values.table import ValueTable

SUB_KEYS, TOKENS, MICRO_BATCHES, UPDATES = 20, 64, 2, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "sparse_adam": {},
    "clipped": {"optimizer": "adam", "clip_norm": 2.0},
    "row_steps": {"row_steps": True},
    "rounded": {"moments": "bf16"},
    "catch_up": {"stale": "catch_up"},
    "swept": {"stale": "catch_up", "optimizer": "adam"},
    "summed early": {},
    "bf16": {},
    "fp16": {"clip_norm": 2.0},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(exchange: Exchange, name: str) -> tuple[dict[str, Tensor], ValueTable]:
    """Updates of two micro-batches; each rank's loss is R times its part of the whole, as a mean over its tokens is."""
    config = settings(sub_keys=SUB_KEYS, **VARIANTS[name])
    table = ValueTable(config, WIDTH, 4, 1, exchange)
    optimizer = SparseValueOptimizer.of(config, [table])
    optimizer.sweep = 0.7 if name == "swept" else 2.0
    dtype = DTYPES.get(name, torch.float32)
    if name == "summed early":
        table.gradient.limit = 1
    found: dict[str, Tensor] = {}
    norms, rows = [], []
    exchange.reset()
    for update in range(UPDATES):
        for micro in range(MICRO_BATCHES):
            # Fewer slots each time, so that some become stale.
            seed, share = MICRO_BATCHES * update + micro, (0.9, 0.3)[update % 2]
            mine = reads(seed, SUB_KEYS**2, TOKENS, READS, WIDTH, share).part(exchange.rank, exchange.size)
            weights = mine.weights.requires_grad_()
            out = table(mine.slots, weights, dtype)
            out.backward((mine.upstream * exchange.size).to(dtype))
            found |= {f"out.{seed}": out.detach(), f"weights.{seed}": present(weights.grad) / exchange.size}
        if update == 1:
            # An update that a loss scaler skips.
            assert optimizer.finite()
            optimizer.drop()
            continue
        taken = optimizer.update(1 / exchange.size)
        norms.append(taken.norms[0])
        rows.append(taken.rows[0])
    sent = {f"sent.{what}": torch.tensor(count) for what, count in exchange.bytes.items()}
    # One rank with a number that is not finite: all learn of it.
    gradient = torch.full((1, table.values.shape[1]), torch.inf if exchange.rank == exchange.size - 1 else 0.0)
    table.gradient.add(torch.zeros(1, 1).int(), torch.ones(1, 1), gradient)
    found["finite"] = torch.tensor(optimizer.finite())
    optimizer.drop()
    with torch.no_grad():
        asked = reads(99, SUB_KEYS**2, TOKENS).part(exchange.rank, exchange.size)
        found["evaluated"] = table.eval()(asked.slots, asked.weights, dtype)
    found |= {"norms": torch.tensor(norms, dtype=torch.float64), "rows": torch.tensor(rows)}
    for plane in ("values", "exp_avg", "exp_avg_sq", "last_step", "row_steps"):
        if (tensor := getattr(table, plane)) is not None:
            found[plane] = tensor
    return found | sent, table


def sums(exchange: Exchange) -> dict[str, Tensor]:
    """Sums and maxima of few and of many numbers; which ranks speak to which."""
    found = {}
    for count in (3, 10_007):
        generator = torch.Generator().manual_seed(exchange.rank)
        x = torch.randn(count, dtype=torch.float64, generator=generator)
        exchange.reset()
        found[f"sum.{count}"] = exchange.sum(x.clone())
        found[f"sent.sum.{count}"] = torch.tensor(exchange.bytes.get("sums", 0))
        found[f"maximum.{count}"] = exchange.maximum((x * 1000).int())
    rank = torch.tensor([exchange.rank])
    found["group"] = exchange.gather_tokens(rank, "x")
    found["replicas"] = exchange.gather_replicas(rank, "x")
    found["place"] = torch.tensor([exchange.column, exchange.replica])
    return found


def run_all(columns: int, folder: Path) -> dict[str, Tensor]:
    """Every variant, on the ranks that torch.distributed has, or alone."""
    # Pieces of 64 slots where a rank has all columns, of more where it has few.
    lookup._BUFFER = 64 * 4 * WIDTH
    torch.set_num_threads(1)
    exchange = Exchange(columns)
    cases = {"sums": sums(exchange)}
    for name in VARIANTS:
        cases[name], table = run(exchange, name)
    save_table(table, folder, 10 * exchange.size + exchange.columns)
    return {f"{case}/{name}": tensor for case, found in cases.items() for name, tensor in found.items()}


def rank_of(rank: int, size: int, folder: Path) -> None:
    store = f"file://{folder}/store-{size}"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=size)
    for columns in range(1, size + 1):
        if size % columns == 0:
            found = {name: tensor.clone().contiguous() for name, tensor in run_all(columns, folder).items()}
            save_file(found, folder / f"{size}-{columns}-{rank}.safetensors")
    # Before the group goes, gloo has to be done with its tensors: its threads and its end wait for each other else.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    for ranks in map(int, sys.argv[2:]):
        # Forked before torch has any thread: the ranks share one import of it.
        torch.multiprocessing.start_processes(rank_of, (ranks, Path(sys.argv[1])), ranks, start_method="fork")
    print(json.dumps("done"))
