"""A memory in a model of torch on two ranks, under DistributedDataParallel and DeepSpeed: the values of one rank with
nn.EmbeddingBag(sparse=True) and torch.optim.SparseAdam; overflow; what is saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import mpirun
from support.drivers import module as driver
from torch import Tensor

from distlm.errors import UsageError
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.optimizer import SparseValueOptimizer

pytestmark = pytest.mark.multiprocess

SAME = ["ddp", "zero0", "zero1", "zero2", "zero3"]
OVERFLOWS = ["overflow of a column", "overflow of a copy"]
Found = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("module")
    mpirun(1, [driver.__file__, folder, *SAME, "fp16", *OVERFLOWS, "saved"])
    return folder


@pytest.fixture(scope="module")
def by_torch() -> Found:
    return driver.by_torch()


def found(folder: Path, mode: str) -> list[Found]:
    """What each rank found."""
    return [torch.load(folder / f"{mode}-{rank}.pt") for rank in range(driver.RANKS)]


def start() -> ProductKeyMemory:
    return ProductKeyMemory(driver.WIDTH, **driver.SETTINGS, exchange=Exchange.alone())


def test_one_rank_is_embedding_bag_and_sparse_adam(by_torch: Found) -> None:
    mine = driver.by_distlm(None)
    for name in ("values", "keys", "exp_avg"):
        assert (mine[name] - by_torch[name]).abs().max() <= 1e-6, name
    moved = (start().table.values - by_torch["values"]).abs().amax(1)
    assert moved.median() > 10 * driver.LR


@pytest.mark.parametrize("mode", SAME)
def test_two_ranks_are_embedding_bag_and_sparse_adam_on_one(folder: Path, by_torch: Found, mode: str) -> None:
    """The mean over the ranks, two micro-batches a step, columns over the ranks; nothing is set by hand."""
    ranks = found(folder, mode)
    for rank, mine in enumerate(ranks):
        assert mine["values"].shape == (64, driver.WIDTH // 2)
        assert mine["columns"].tolist() == [rank * 8, rank * 8 + 8, 16]
        assert (mine["whole"] - by_torch["values"]).abs().max() <= 1e-6
        # Adam's steps hardly depend on the scale of the gradient; its moments do.
        wanted = by_torch["exp_avg"][:, rank * 8 : rank * 8 + 8]
        torch.testing.assert_close(mine["exp_avg"], wanted, rtol=1e-3, atol=1e-8)
        # ZeRO 3 has its parts of the keys only.
        assert mode == "zero3" or (mine["keys"] - by_torch["keys"]).abs().max() <= 1e-6
        assert mine["updates"] == driver.STEPS
        # Reads are dated by the updates, which nobody tells the memory.
        assert mine["last_read"].max() == driver.STEPS
    assert torch.equal(torch.cat([mine["values"] for mine in ranks], 1), ranks[0]["whole"])


def test_loss_scale_and_skipped_steps_of_deepspeed(folder: Path) -> None:
    for half, full in zip(found(folder, "fp16"), found(folder, "zero1"), strict=True):
        assert 0 < half["skipped"] < driver.STEPS / 2
        assert half["updates"] == driver.STEPS - half["skipped"]
        assert half["whole"].isfinite().all()
        # The scale is 2¹⁰ and more.
        assert half["norms"] / full["norms"] == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("mode", OVERFLOWS)
def test_an_overflow_that_one_rank_sees_is_skipped_by_all(folder: Path, mode: str) -> None:
    ranks = found(folder, mode)
    for mine in ranks:
        assert mine["scales"].tolist() == [1024, 512, 512, 512]
        tables = mine["tables"]
        assert torch.equal(tables[1], tables[0])
        assert not torch.equal(tables[2], tables[1]) and tables.isfinite().all()
        assert torch.equal(tables, ranks[0]["tables"])


def test_what_is_loaded_on_each_rank_gives_the_same_bits(folder: Path) -> None:
    """The module unpickled, its state dict, and the state dict with the whole table."""
    ranks = found(folder, "saved")
    for mine in ranks:
        for outputs in mine["outputs"]:
            assert torch.equal(outputs, mine["outputs"][0])
        # A seed that is drawn is that of rank 0.
        assert torch.equal(mine["drawn"], ranks[0]["drawn"]) and torch.equal(mine["drawn keys"], ranks[0]["drawn keys"])
    assert not torch.equal(ranks[0]["drawn"], start().table.values)


def state_of(mine: Found) -> dict[str, Any]:
    return {
        name.removeprefix("state.memory."): tensor for name, tensor in mine.items() if name.startswith("state.memory.")
    }


def test_columns_of_several_ranks_are_not_taken_for_a_table(folder: Path) -> None:
    ranks = found(folder, "saved")
    for rank, mine in enumerate(ranks):
        message = r"values is \[64, 8\], columns \d+ to \d+ of 16; this rank has columns 0 to 16 of 16, \[64, 16\]"
        with pytest.raises(RuntimeError, match=message):
            start().load_state_dict(state_of(mine), strict=False)
        with pytest.raises(UsageError, match=r"pickled on rank \d of 2, and this is rank 0 of 1"):
            torch.load(folder / f"module-{rank}.pt", weights_only=False)
    # As the message says.
    whole = torch.cat([mine["state.memory.table.values"] for mine in ranks], 1)
    memory = start()
    memory.load_state_dict({**state_of(ranks[0]), "table.values": whole})
    assert torch.equal(memory.table.values, ranks[0]["whole"])


def test_a_memory_that_was_built_too_early_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test of this process may have joined a group.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    memory, alone = ProductKeyMemory(driver.WIDTH, **driver.SETTINGS), start()
    optimizer = SparseValueOptimizer(memory)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for ranks in (1, 2):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda ranks=ranks: ranks)
        if ranks == 1:
            SparseValueOptimizer(memory)
            continue
        for make in (lambda: SparseValueOptimizer(memory), optimizer.step):
            with pytest.raises(UsageError, match=r"built before torch\.distributed was initialised with 2 ranks"):
                make()
        SparseValueOptimizer(alone)
