"""python memory.py FOLDER RANKS:COLUMNS ...: what a memory computes on each rank of some cuts, into
FOLDER/RANKS-ranks-RANK.safetensors (tests/multiprocess/memory/test_memory_ranks.py)."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.present import present
from torch import Tensor

from distlm.memory.config import MemoryConfig
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.norm import QueryNorm
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.optimizer import SparseValueOptimizer

ROWS, TOKENS, CHANNELS, WIDTH = 4, 6, 5, 16
UPDATES = 3
CONFIG = MemoryConfig(kind="resm", sub_keys=8, heads=2, k=4, key_width=8, lr=0.01)

MASKS = {
    "none": lambda mask: mask,
    "some": lambda mask: mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)) < 0.7),
    "all of the last rank": lambda mask: mask & (torch.arange(ROWS) < ROWS - 2)[:, None],
    "all but one": lambda mask: mask & (torch.arange(mask.numel()) == 9).view(mask.shape),
    "all": lambda mask: mask & False,
}


def global_batch(width: int, seed: int) -> tuple[Tensor, Tensor]:
    """x [ROWS, TOKENS, width] of all ranks, and the gradient of the loss with respect to what comes out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, TOKENS, width, generator=generator) * 2 + 1
    return x, torch.randn(ROWS, TOKENS, width, generator=generator)


def run_norm(exchange: Exchange, masked: str) -> dict[str, Tensor]:
    """Three micro-batches; each rank's loss is R times its part of the whole, as the trainer scales it."""
    norm = QueryNorm(CHANNELS, 0.3, exchange)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
    mine = slice(exchange.rank * ROWS // exchange.size, (exchange.rank + 1) * ROWS // exchange.size)
    mask = MASKS[masked](torch.ones(ROWS, TOKENS, dtype=torch.bool))[mine].reshape(-1)
    found: dict[str, Tensor] = {}
    for step in range(3):
        x, upstream = (tensor[mine].reshape(-1, CHANNELS) for tensor in global_batch(CHANNELS, step))
        out = norm(x.requires_grad_(), mask)
        out.backward(upstream * exchange.size)
        found |= {f"out.{step}": out.detach(), f"x.{step}": present(x.grad) / exchange.size}
    found |= {"weight": present(norm.weight.grad) / exchange.size, "bias": present(norm.bias.grad) / exchange.size}
    return found | {"mean": norm.running_mean, "var": norm.running_var}


def run_layer(exchange: Exchange) -> dict[str, Tensor]:
    """Some updates of a whole memory: dense gradients are averaged over the ranks, as the engine does."""
    memory = ProductKeyMemory.of(CONFIG, WIDTH, 4, 1, exchange)
    values = SparseValueOptimizer.of(CONFIG, [memory.table])
    mine = slice(exchange.rank * ROWS // exchange.size, (exchange.rank + 1) * ROWS // exchange.size)
    mask = MASKS["some"](torch.ones(ROWS, TOKENS, dtype=torch.bool))[mine]
    found: dict[str, Tensor] = {}
    for update in range(1, UPDATES + 1):
        memory.update = update
        x, upstream = (tensor[mine] for tensor in global_batch(WIDTH, update))
        out = memory(x.requires_grad_(), mask)
        out.backward(upstream * exchange.size)
        values.update(1 / exchange.size)
        found |= {f"out.{update}": out.detach(), f"x.{update}": present(x.grad) / exchange.size}
        with torch.no_grad():
            for name, parameter in memory.named_parameters():
                gradient = exchange.sum(present(parameter.grad).double()) / exchange.size
                found[f"{name}.{update}"] = gradient.float()
                parameter.sub_(0.1 * gradient)
                parameter.grad = None
        found[f"values.{update}"] = memory.table.values.clone()
    with torch.no_grad():
        found["evaluated"] = memory.eval()(x, mask)
    extra = memory.extra_state_tensors()
    memory.load_extra(extra)
    again = memory.extra_state_tensors()
    return found | {f"extra.{name}": extra[name] for name in extra} | {f"again.{name}": again[name] for name in again}


def run_all(columns: int) -> dict[str, Tensor]:
    """Every case on the ranks that torch.distributed has, or alone."""
    exchange = Exchange(columns)
    cases = {f"norm.{masked}": run_norm(exchange, masked) for masked in MASKS}
    cases["layer"] = run_layer(exchange)
    return {f"{case}/{name}": tensor for case, found in cases.items() for name, tensor in found.items()}


def rank_of(rank: int, size: int, columns: int, folder: Path) -> None:
    store = f"file://{folder}/store-{size}"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=size)
    found = {name: tensor.contiguous() for name, tensor in run_all(columns).items()}
    save_file(found, folder / f"{size}-ranks-{rank}.safetensors")
    # Before the group goes, gloo has to be done with its tensors: its threads and its end wait for each other else.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    for cut in sys.argv[2:]:
        ranks, of_columns = map(int, cut.split(":"))
        # Forked before torch has any thread: the ranks share one import of it.
        torch.multiprocessing.start_processes(
            rank_of, (ranks, of_columns, Path(sys.argv[1])), ranks, start_method="fork"
        )
