"""1, 2 and 4 ranks pretrain one masked language model with memories: copies or columns, on every ZeRO stage, with
gradient accumulation; and a run goes on on another number of ranks."""

from pathlib import Path

import pytest
import torch
from support.plm import memory_of, plm_config, plm_settings, tiny_shards
from support.shared import made_once
from support.train import curve, newest, relative, train_all, weight_difference

from distlm.data.shards.reader import ShardRows
from distlm.memory.plan import Work, plan_memory
from distlm.models.plm.text.pieces import plan_rows

pytestmark = pytest.mark.multiprocess

FEW, MANY = 20, 100
# Over 100 updates of two micro-batches. Measured: losses 2e-6, weights 4e-4 of the largest, values 3e-5.
LOSSES, WEIGHTS, VALUES = 1e-4, 1e-2, 1e-3

LAYOUTS = {"copies": "memory.columns=1", "columns": "memory.columns=0", "both": "memory.columns=2"}
"""A full copy on every rank, columns over all ranks, columns over pairs of ranks."""
QUICK = {
    1: ["1-zero0-copies"],
    2: ["2-zero1-columns", "2-zero3-copies"],
    4: ["4-zero2-both"],
}
DIFFERENT = {1: ["copies"], 2: ["copies", "columns"], 4: ["copies", "columns", "both"]}
"""The layouts that differ on so many ranks."""
OTHERS = [(ranks, stage) for ranks in DIFFERENT for stage in range(4) if (ranks, stage) != (1, 0)]
ONE = QUICK[1][0]


def memory_settings(shards: Path, run: Path, updates: int, layout: str, *extra: str) -> list[str]:
    """Overrides of a run with memories, whose rows are short at first."""
    words = ["memory.kind=resm", "plm.short_rows=[8,12]", "plm.short_updates=[5,6]", f"train.updates={updates}"]
    return plm_settings(shards, run, *words, LAYOUTS[layout], *extra)


def train(folder: Path, names: dict[int, list[str]], updates: int) -> Path:
    """Every name RANKS-ZERO-LAYOUT trained in its own folder, with shards beside them."""
    shards = tiny_shards(folder)
    for ranks, runs in names.items():
        jobs = []
        for name in runs:
            _, stage, layout = name.split("-")
            jobs.append(memory_settings(shards, folder / name, updates, layout, f"train.deepspeed={stage}"))
        train_all(ranks, folder, jobs)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "plm-ranks", lambda folder: train(folder, QUICK, FEW))


def test_every_number_of_ranks_trains_the_same(runs: Path) -> None:
    for name in (name for names in QUICK.values() for name in names if name != ONE):
        compare(runs / ONE, runs / name, FEW)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one rank that all others must equal."""
    return train(tmp_path_factory.mktemp("plm-ranks-all"), {1: [ONE]}, MANY)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("ranks", "stage"), OTHERS)
def test_every_layout_on_every_zero_stage_trains_the_same(long_run: Path, ranks: int, stage: int) -> None:
    names = [f"{ranks}-zero{stage}-{layout}" for layout in DIFFERENT[ranks]]
    train(long_run, {ranks: names}, MANY)
    for name in names:
        compare(long_run / ONE, long_run / name, MANY)


def compare(one: Path, other: Path, updates: int) -> None:
    """Losses, weights, values, moments and counters agree after the last update."""
    assert len(curve(one)) == updates
    assert curve(one, "train/data_fingerprint") == curve(other, "train/data_fingerprint")
    assert relative(curve(one), curve(other)) < LOSSES
    assert relative(curve(one, "valid/loss"), curve(other, "valid/loss")) < LOSSES
    assert weight_difference(one, other) < WEIGHTS
    for layer in (1, 3):
        expected, found = memory_of(one, layer), memory_of(other, layer)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            difference = (value.double() - found[key].double()).abs().max()
            assert difference <= VALUES * value.double().abs().max(), (other.name, layer, key, float(difference))


def test_training_moves_the_memory_and_counts_its_use(runs: Path) -> None:
    state, fresh = memory_of(runs / ONE, 1), torch.zeros(64, dtype=torch.int32)
    assert int(state["last_step"].max()) == FEW and (state["last_step"] != fresh).sum() > 32
    assert state["exp_avg_sq"].max() > 0
    use = curve(runs / ONE, "memory/1/top1_mu")
    assert len(use) == FEW and 0 < use[FEW] <= 1
    assert curve(runs / ONE, "memory/1/rows")[FEW] == (state["last_step"] == FEW).sum()
    assert 0 <= curve(runs / ONE, "memory/1/stale")[FEW] < 1


@pytest.mark.parametrize("name", [name for names in QUICK.values() for name in names])
def test_bytes_sent_are_those_planned(runs: Path, name: str) -> None:
    """Every update's, and no others: not those of validation, of counters, or of a checkpoint."""
    ranks, _, layout = name.split("-")
    config = plm_config(runs / "shards", runs / name, "memory.kind=resm", LAYOUTS[layout])
    micro = plan_rows(config.train, int(ranks))
    rows = ShardRows.open(runs / "shards", "train")
    work = Work(int(ranks), micro.micro_blocks * rows.row_tokens, micro.accumulation, len(config.memory.positions))
    plans = {plan.columns: plan for plan in plan_memory(config.memory, config.plm.width, work)}
    planned = plans[config.memory.columns or int(ranks)].bytes
    assert set(curve(runs / name, "perf/memory_sent_bytes").values()) == {planned}
    assert (planned > 0) == (ranks != "1")
    norms = curve(runs / name, "memory/3/grad_norm")
    assert min(norms.values()) > 0 and relative(norms, curve(runs / ONE, "memory/3/grad_norm")) < 1e-3


def test_a_run_goes_on_on_another_number_of_ranks(runs: Path) -> None:
    """Two ranks with columns, then one, then two with copies: the curve of one rank."""
    shards, folder = runs / "shards", runs / "2-1-2"
    for ranks, layout, updates in ((2, "columns", 8), (1, "copies", 6), (2, "copies", 0)):
        extra = [f"train.max_updates_this_run={updates}", "train.deepspeed=zero0"]
        found = train_all(ranks, runs, [memory_settings(shards, folder, FEW, layout, *extra)])
        assert ("stopped" in found[0]) == (updates > 0)
    assert newest(folder).name == f"step-{FEW:08d}"
    one = runs / ONE
    assert curve(one, "train/data_fingerprint") == curve(folder, "train/data_fingerprint")
    assert relative(curve(one), curve(folder)) < LOSSES
    for layer in (1, 3):
        expected, found_there = memory_of(one, layer)["values"], memory_of(folder, layer)["values"]
        assert (expected - found_there).abs().max() < VALUES
