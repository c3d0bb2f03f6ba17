"""A memory's values on several ranks, however they share the columns: the bits of one rank, and the predicted bytes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import mpirun
from support.drivers import memory_table as driver
from support.drivers.memory_table import DTYPES, MICRO_BATCHES, SUB_KEYS, TOKENS, UPDATES, VARIANTS
from support.memory import WIDTH, settings
from torch import Tensor

from distlm.memory.plan import Work, plan_memory
from distlm.memory.values.exchange import Exchange
from distlm.memory.values.files import load_table
from distlm.memory.values.table import ValueTable

pytestmark = pytest.mark.multiprocess

CUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
Found = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    mpirun(1, [driver.__file__, folder, "1", "2", "4"])
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    return load_file(folder / "1-1-0.safetensors")


@pytest.fixture(params=CUTS, ids=lambda cut: f"{cut[0]} ranks by {cut[1]}")
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[Found]:
    """What each rank found."""
    size, columns = request.param
    return [load_file(folder / f"{size}-{columns}-{rank}.safetensors") for rank in range(size)]


def in_rank_order(ranks: list[Found], name: str) -> Tensor:
    return torch.cat([found[name] for found in ranks])


@pytest.mark.parametrize("name", list(VARIANTS))
def test_bits_of_one_rank(ranks: list[Found], alone: Found, name: str) -> None:
    """Outputs, values, moments and counters, after updates of two micro-batches and one that was dropped."""
    for key in [key for key in alone if key.startswith(f"{name}/out.")] + [f"{name}/evaluated"]:
        assert torch.equal(in_rank_order(ranks, key), alone[key]), key
    columns = len(ranks[0]["sums/group"])
    for first in range(0, len(ranks), columns):
        replica = ranks[first : first + columns]
        for plane in ("values", "exp_avg", "exp_avg_sq"):
            whole = torch.cat([found[f"{name}/{plane}"] for found in replica], 1)
            assert torch.equal(whole, alone[f"{name}/{plane}"]), plane
    for found in ranks:
        for counter in ("last_step", "rows", *(["row_steps"] if name == "row_steps" else [])):
            assert torch.equal(found[f"{name}/{counter}"], alone[f"{name}/{counter}"])
        assert torch.equal(found[f"{name}/norms"], ranks[0][f"{name}/norms"])
        torch.testing.assert_close(found[f"{name}/norms"], alone[f"{name}/norms"], rtol=1e-5, atol=0)
        if VARIANTS[name].get("clip_norm"):
            assert torch.equal(found[f"{name}/norms"], alone[f"{name}/norms"])
            assert alone[f"{name}/norms"].min() > 2


@pytest.mark.parametrize("name", list(VARIANTS))
def test_gradient_of_the_weights(ranks: list[Found], alone: Found, name: str) -> None:
    """A sum over columns: fp32 rounding, and the same bits where every rank has all columns."""
    keys = [key for key in alone if key.startswith(f"{name}/weights.")]
    assert len(keys) == UPDATES * MICRO_BATCHES
    for key in keys:
        mine = in_rank_order(ranks, key)
        torch.testing.assert_close(mine, alone[key], rtol=1e-5, atol=1e-6)
        assert torch.equal(mine, alone[key]) or len(ranks[0]["sums/group"]) > 1


def test_variants_differ(alone: Found) -> None:
    """Or the tests above would compare nothing."""
    values = [alone[f"{name}/values"] for name in VARIANTS if name != "summed early"]
    assert len({tuple(v.flatten().tolist()) for v in values}) == len(VARIANTS) - 1
    assert torch.equal(alone["summed early/values"], alone["sparse_adam/values"])
    assert alone["catch_up/last_step"].unique().tolist() == [0, 1, 2, 3]
    assert alone["sparse_adam/rows"].max() > 128


def test_groups_and_sums(ranks: list[Found]) -> None:
    size, columns = len(ranks), len(ranks[0]["sums/group"])
    for rank, found in enumerate(ranks):
        first = rank // columns * columns
        assert found["sums/group"].tolist() == list(range(first, first + columns))
        assert found["sums/replicas"].tolist() == list(range(rank % columns, size, columns))
        assert found["sums/place"].tolist() == [rank % columns, rank // columns]
    for count in (3, 10_007):
        parts = [
            torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(size)
        ]
        wanted = parts[0].clone()
        for part in parts[1:]:
            wanted += part
        for found in ranks:
            assert torch.equal(found[f"sums/sum.{count}"], wanted)
            assert torch.equal(found[f"sums/maximum.{count}"], torch.stack(parts).mul(1000).int().amax(0))
        sent = int(ranks[0][f"sums/sent.sum.{count}"])
        assert sent == (size - 1) * 8 * 3 if count == 3 else sent == 2 * (size - 1) * 8 * -(-count // size)


def test_one_bad_number_is_known_to_all(ranks: list[Found], alone: Found) -> None:
    for found in (*ranks, alone):
        assert not any(found[f"{name}/finite"] for name in VARIANTS)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_predicted_bytes_are_those_sent(ranks: list[Found], name: str) -> None:
    """Of all micro-batches and updates; nobody sends the gradient of a dropped one, nor asks for its norm."""
    columns, size = len(ranks[0]["sums/group"]), len(ranks)
    work = Work(size, TOKENS // size, MICRO_BATCHES, activation_bytes=2 if name in DTYPES else 4)
    plans = plan_memory(settings(sub_keys=SUB_KEYS, **VARIANTS[name]), WIDTH, work)
    (plan,) = [plan for plan in plans if plan.columns == columns]
    of_update = {"stash", "norms"} if name != "summed early" else {"norms"}
    # There is no query norm on these tables.
    wanted = {what: count * (UPDATES - (what in of_update)) for what, count in plan.sent.items() if what != "norm"}
    for found in ranks:
        sent = {key.split("sent.")[1]: int(found[key]) for key in found if key.startswith(f"{name}/sent.")}
        assert sent == wanted


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_what_ranks_wrote_is_read_by_one(folder: Path, alone: Found, cut: tuple[int, int]) -> None:
    size, columns = cut
    last = list(VARIANTS)[-1]
    table = ValueTable(settings(sub_keys=SUB_KEYS, **VARIANTS[last]), WIDTH, 4, 7, Exchange.alone())
    load_table(table, folder, 10 * size + columns)
    assert len(list(folder.glob(f"memory-{10 * size + columns}-*"))) == columns
    for plane in ("values", "exp_avg", "exp_avg_sq", "last_step"):
        assert torch.equal(getattr(table, plane), alone[f"{last}/{plane}"])
    assert table.updates == UPDATES - 1
