"""python module.py FOLDER MODE ...: a toy model with a memory, trained on two ranks of gloo as MODE says, into FOLDER/
MODE-RANK.pt (tests/multiprocess/memory/test_module_ranks.py); and the same on one rank with torch's own parts."""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.present import present
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distlm.memory.layer import ProductKeyMemory
from distlm.memory.retrieval import ProductKeys
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.optimizer import SparseValueOptimizer

RANKS, STEPS, MICRO_BATCHES, ROWS, TOKENS, WIDTH = 2, 30, 2, 4, 8, 16
SETTINGS: dict[str, Any] = {"sub_keys": 8, "heads": 2, "k": 3, "key_width": 8, "seed": 5}
LR = 1e-3


class Toy(nn.Module):
    """Linear, memory beside it, Linear."""

    memory: Any

    def __init__(self, memory: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.memory = memory
        with torch.no_grad():
            for part in (self.first, self.last):
                for parameter in part.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        out: Tensor = self.last(hidden + self.memory(hidden))
        return out


class Bag(nn.Module):
    """A memory of torch's parts, its values a parameter with a sparse gradient."""

    def __init__(self, memory: ProductKeyMemory) -> None:
        super().__init__()
        config = memory.config
        self.retrieval = ProductKeys(config, WIDTH, Exchange.alone(), torch.Generator())
        self.retrieval.load_state_dict(memory.retrieval.state_dict())
        self.values = nn.EmbeddingBag(config.sub_keys**2, WIDTH, mode="sum", sparse=True)
        with torch.no_grad():
            self.values.weight.copy_(memory.table.whole())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        slots, scores = self.retrieval(flat, torch.ones(len(flat), dtype=torch.bool))
        out: Tensor = self.values(slots.flatten(1).long(), per_sample_weights=scores.softmax(2).flatten(1))
        return out.view(x.shape)


def batch(step: int, micro: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """x and target [ROWS, TOKENS, WIDTH] of all ranks, or a rank's rows of them."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    both = torch.randn(2, ROWS, TOKENS, WIDTH, generator=generator)
    x, target = both if rank is None else both.chunk(RANKS, 1)[rank]
    return x, target


def losses_of(model: Callable[[Tensor], Tensor], step: int, rank: int | None) -> list[Callable[[], Tensor]]:
    """The losses of a step's micro-batches; their mean is the step's."""

    def one(micro: int) -> Tensor:
        x, target = batch(step, micro, rank)
        return (model(x) - target).square().mean()

    return [lambda micro=micro: one(micro) for micro in range(MICRO_BATCHES)]  # type: ignore[misc]


def by_torch() -> dict[str, Tensor]:
    """On one rank: nn.EmbeddingBag and torch.optim.SparseAdam."""
    model = Toy(Bag(ProductKeyMemory(WIDTH, **SETTINGS, exchange=Exchange.alone())))
    values = model.memory.get_parameter("values.weight")
    rest = torch.optim.Adam([p for p in model.parameters() if p is not values], lr=LR)
    sparse = torch.optim.SparseAdam([values], lr=LR)
    for step in range(STEPS):
        for loss in losses_of(model, step, None):
            (loss() / MICRO_BATCHES).backward()
        for optimizer in (rest, sparse):
            optimizer.step()
            optimizer.zero_grad()
    exp_avg = sparse.state[values]["exp_avg"]
    return {
        "values": values.detach(),
        "exp_avg": exp_avg,
        "keys": model.memory.get_parameter("retrieval.keys").detach(),
    }


def by_distlm(rank: int | None, wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> dict[str, Tensor]:
    """Alone (rank None), or one of two ranks; wrap: DistributedDataParallel."""
    model = Toy(ProductKeyMemory(WIDTH, **SETTINGS))
    wrapped = wrap(model)
    rest = torch.optim.Adam(model.parameters(), lr=LR)
    values = SparseValueOptimizer(wrapped, lr=LR)
    for step in range(STEPS):
        for loss in losses_of(wrapped, step, rank):
            (loss() / MICRO_BATCHES).backward()
        for optimizer in (rest, values):
            optimizer.step()
            optimizer.zero_grad()
    return found_in(model.memory)


def by_deepspeed(rank: int, stage: int, **precision: Any) -> dict[str, Tensor]:
    """DeepSpeed accumulates the micro-batches, and has the loss scale. Unless told not to it clips gradients at 1."""
    from distlm.runtime.ranks.world import resolve_world
    from distlm.training.engine import _allow_fp16_on_cpu, _import_deepspeed

    deepspeed = _import_deepspeed(resolve_world(), torch.device("cpu"))
    _allow_fp16_on_cpu(deepspeed, resolve_world())
    model = Toy(ProductKeyMemory(WIDTH, **SETTINGS))
    config = {
        "train_micro_batch_size_per_gpu": ROWS // RANKS, "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
        **precision,
    }  # fmt: skip
    adam = torch.optim.Adam(model.parameters(), lr=LR)
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config, dist_init_required=False)
    values = SparseValueOptimizer(engine, lr=LR)
    half = bool(precision)
    for step in range(STEPS):
        for loss in losses_of(lambda x: engine(x.half() if half else x).float(), step, rank):
            engine.backward(loss())
            engine.step()
            values.step()
    found = found_in(model.memory, keys=stage < 3)
    norms = torch.tensor(present(values.outcome).norms)
    return found | {"skipped": torch.tensor(engine.skipped_steps), "norms": norms}


def found_in(memory: Any, keys: bool = True) -> dict[str, Tensor]:
    table = memory.table
    found = {"values": table.values, "updates": torch.tensor(table.updates), "columns": table.state_dict()["columns"]}
    found |= {"exp_avg": table.exp_avg, "whole": table.whole(), "reads": memory.usage.counts().reads}
    found |= {"last_read": memory.usage.counts().last_read}
    return found | ({"keys": memory.retrieval.keys.detach().float()} if keys else {})


def overflow(rank: int, columns: int) -> dict[str, Tensor]:
    """GradScaler; in the second step one column of one rank's gradient overflows, where not every rank sees it."""
    memory = ProductKeyMemory(WIDTH, **SETTINGS, columns=columns)
    values, scaler = SparseValueOptimizer(memory, lr=LR), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales, tables = [], []
    for step in range(4):
        x, upstream = batch(step, 0, rank)
        if step == 1 and rank == 1:
            upstream[0, 0, 0] = 1e38
        scaler.scale((memory(x) * upstream).sum()).backward()
        scaler.step(values)
        scaler.update()
        scales.append(scaler.get_scale())
        tables.append(memory.table.whole().clone())
    return {"scales": torch.tensor(scales), "tables": torch.stack(tables)}


def saved(rank: int, folder: Path) -> dict[str, Tensor]:
    """Each rank's state dict and pickled module, and what the loaded give."""
    model = Toy(ProductKeyMemory(WIDTH, **SETTINGS))
    values = SparseValueOptimizer(model, lr=LR)
    x = batch(0, 0, rank)[0]
    for _ in range(3):
        model(x).square().mean().backward()
        values.step()
    whole = model.memory.table.whole()
    torch.save(model.memory, folder / f"module-{rank}.pt")
    loaded = Toy(torch.load(folder / f"module-{rank}.pt", weights_only=False))
    fresh = Toy(ProductKeyMemory(WIDTH, **SETTINGS | {"seed": 6}))
    fresh.load_state_dict(model.state_dict())
    of_whole = Toy(ProductKeyMemory(WIDTH, **SETTINGS | {"seed": 6}))
    of_whole.load_state_dict({**model.state_dict(), "memory.table.values": whole})
    of_drawn = ProductKeyMemory(WIDTH, **SETTINGS | {"seed": None})
    with torch.no_grad():
        outputs = [part.eval()(x) for part in (model, loaded, fresh, of_whole)]
    return {
        "outputs": torch.stack(outputs), "whole": whole, "drawn": of_drawn.table.whole(),
        "drawn keys": of_drawn.retrieval.keys.detach(),
        **{f"state.{name}": tensor for name, tensor in model.state_dict().items()},
    }  # fmt: skip


def rank_of(rank: int, modes: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(rank)
    half = {"fp16": {"enabled": True, "initial_scale_power": 22, "loss_scale_window": 1000, "hysteresis": 1}}
    ways: dict[str, Callable[[], dict[str, Tensor]]] = {
        "ddp": lambda: by_distlm(rank, DistributedDataParallel),
        "overflow of a column": lambda: overflow(rank, 0),
        "overflow of a copy": lambda: overflow(rank, 1),
        "saved": lambda: saved(rank, folder),
        "fp16": lambda: by_deepspeed(rank, 1, **half),
        **{f"zero{stage}": lambda stage=stage: by_deepspeed(rank, stage) for stage in range(4)},  # type: ignore[misc]
    }
    for mode in modes:
        torch.save({name: tensor.clone() for name, tensor in ways[mode]().items()}, folder / f"{mode}-{rank}.pt")
    # Before the group goes, gloo has to be done with its tensors: its threads and its end wait for each other else.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    # Forked before torch has any thread: the ranks share one import of it.
    torch.multiprocessing.start_processes(rank_of, (sys.argv[2:], Path(sys.argv[1])), RANKS, start_method="fork")
