"""A memory on several ranks gives what it gives on one: query norm, output, gradients, values after updates, use."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import mpirun
from support.drivers import memory as driver
from torch import Tensor

pytestmark = pytest.mark.multiprocess

# Ranks, and how many of them share the columns: one copy of the values on two ranks, two copies on four.
CUTS = [(2, 0), (4, 2)]
Found = dict[str, Tensor]


@pytest.fixture(scope="module")
def alone() -> Found:
    return driver.run_all(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    mpirun(1, [driver.__file__, folder, *(f"{size}:{columns}" for size, columns in CUTS)])
    return folder


@pytest.fixture(params=[size for size, _ in CUTS], ids=lambda size: f"{size} ranks")
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[Found]:
    """What each rank found."""
    return [load_file(folder / f"{request.param}-ranks-{rank}.safetensors") for rank in range(request.param)]


def same_on_all(ranks: list[Found], name: str) -> Tensor:
    for found in ranks[1:]:
        assert torch.equal(found[name], ranks[0][name]), name
    return ranks[0][name]


def close(mine: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(mine.reshape(wanted.shape), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked", list(driver.MASKS))
def test_query_norm(alone: Found, ranks: list[Found], masked: str) -> None:
    """Outputs, statistics and the gradient of x hold on each rank; those of weight and bias are its tokens' part."""
    for name in ("mean", "var"):
        # Sums in another order differ in the last bit of fp64, which fp32 hardly ever shows.
        close(same_on_all(ranks, f"norm.{masked}/{name}"), alone[f"norm.{masked}/{name}"], 1e-7)
    for step in range(3):
        for name in (f"out.{step}", f"x.{step}"):
            close(torch.cat([found[f"norm.{masked}/{name}"] for found in ranks]), alone[f"norm.{masked}/{name}"])
    for name in ("weight", "bias"):
        local = torch.stack([found[f"norm.{masked}/{name}"] for found in ranks])
        close(local.sum(0), alone[f"norm.{masked}/{name}"])
        assert not torch.equal(local[0], local[1])


def test_the_statistics_cross_ranks(ranks: list[Found]) -> None:
    """A rank without any unmasked token takes part in everything, and gets what the others' tokens say."""
    name = "norm.all of the last rank/mean"
    assert same_on_all(ranks, name).abs().min() > 0
    assert ranks[-1]["norm.all of the last rank/x.0"].abs().min() > 0
    assert same_on_all(ranks, "norm.all/mean").eq(0).all()


def test_whole_memory(alone: Found, ranks: list[Found]) -> None:
    for update in range(1, driver.UPDATES + 1):
        for name in (f"out.{update}", f"x.{update}"):
            close(torch.cat([found[f"layer/{name}"] for found in ranks]), alone[f"layer/{name}"], 1e-5)
        for parameter in ("retrieval.keys", "retrieval.query.weight", "retrieval.norm.weight", "retrieval.norm.bias"):
            name = f"layer/{parameter}.{update}"
            close(same_on_all(ranks, name), alone[name], 1e-5)
            assert alone[name].abs().max() > 0.01
        columns = [found[f"layer/values.{update}"] for found in ranks]
        copies = torch.cat(columns, 1).split(driver.WIDTH, 1)
        for copy in copies:
            close(copy, alone[f"layer/values.{update}"], 1e-5)
            assert torch.equal(copy, copies[0])
    assert (alone["layer/values.3"] - alone["layer/values.1"]).abs().max() > 0.005
    close(torch.cat([found["layer/evaluated"] for found in ranks]), alone["layer/evaluated"], 1e-5)


def test_counters_and_running_statistics(alone: Found, ranks: list[Found]) -> None:
    for name in (name for name in alone if name.startswith("layer/extra.")):
        found = same_on_all(ranks, name)
        if found.is_floating_point():
            close(found, alone[name])
        else:
            assert torch.equal(found, alone[name]), name
        # Kept and continued: nothing is counted once for every rank.
        assert torch.equal(same_on_all(ranks, name.replace("extra", "again")), found), name
    reads = driver.CONFIG.heads * driver.CONFIG.k * driver.UPDATES
    mask = driver.MASKS["some"](torch.ones(driver.ROWS, driver.TOKENS, dtype=torch.bool))
    assert alone["layer/extra.usage.reads"].sum() == reads * mask.sum()
