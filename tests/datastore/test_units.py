"""Units within shards: several ranks and starts fill one file, and its bytes are those of one."""

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from support.store import file_hashes, ready_run

from distlm.config.schema import RunConfig
from distlm.datastore import writer
from distlm.datastore.manifest import planned_manifest, planned_shard, sidecar_path, write_sidecar
from distlm.datastore.plan import StorePlan, cut, following, plan_store
from distlm.datastore.reader import Datastore
from distlm.datastore.records import UnitsFile
from distlm.datastore.shard_writer import Streak
from distlm.datastore.unfinished import units as unfinished
from distlm.datastore.unfinished.files import part_path, put_in_place, read_back, seal, units_path
from distlm.datastore.verify import verify_datastore
from distlm.datastore.writer import StoreJob, StoreSummary, open_job, put_keys, run_datastore_write
from distlm.errors import DistlmError
from distlm.models.io import load_model
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import open_stage
from distlm.runtime.units.planned import efficiency, speedup
from distlm.runtime.units.rounds import rounds

WHOLE = ["datastore.rows_per_shard=100000"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose store is one shard, not written yet."""
    return ready_run(tmp_path_factory.mktemp("made"), lines=300, extra=WHOLE)


@pytest.fixture(scope="module")
def undisturbed(made: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checksums of the store that one start writes."""
    config = moved(made, tmp_path_factory.mktemp("undisturbed") / "run")
    write(config)
    assert verify_datastore(folder_of(config)) == []
    return file_hashes(folder_of(config))


@pytest.fixture
def config(made: RunConfig, tmp_path: Path) -> RunConfig:
    return moved(made, tmp_path / "run")


def moved(config: RunConfig, to: Path) -> RunConfig:
    shutil.copytree(config.run_dir, to)
    return dataclasses.replace(config, run_dir=str(to))


def folder_of(config: RunConfig) -> Path:
    return RunDir.of(config).datastore


def write(config: RunConfig) -> StoreSummary:
    with open_stage("datastore", config) as stage:
        return run_datastore_write(stage)


def job_of(config: RunConfig) -> StoreJob:
    return open_job(config, RunDir.of(config))


class KilledError(Exception):
    pass


def killed_after(config: RunConfig, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that writes and records so many units, and no more."""
    original = unfinished.write_units

    def record(folder, settings, share, unit_rows, done):
        original(folder, settings, share, unit_rows, done)
        if done:
            raise KilledError

    monkeypatch.setattr(unfinished, "write_units", record)
    monkeypatch.setattr(
        writer, "rounds", lambda stage, label, pending, act, at_once=1: rounds(stage, label, pending, act, units)
    )
    with pytest.raises(KilledError):
        write(config)
    monkeypatch.undo()


def test_units_are_as_small_as_batches_allow() -> None:
    plan = plan_store(103_227_021, 1536, 1536, 2, 1_000_000, 3072)
    assert plan.unit_rows == 3072 and plan.unit_count == 33_603
    assert efficiency([plan.unit_count], 128) > 0.97 and efficiency([plan.unit_count], 1024) > 0.97
    # Blocks so short that each batch as a unit would be a million of them.
    many = plan_store(103_227_021, 64, 64, 2, 1_000_000)
    assert many.unit_rows % 128 == 0 and 32_000 < many.unit_count < 36_000
    small = plan_store(180_084, 128, 896, 2, 1_000_000)
    assert speedup([small.unit_count], 2) >= 1.9 and speedup([small.unit_count], 4) >= 3.8


def test_the_units_of_a_shard_are_its_batches() -> None:
    plan = plan_store(5003, 32, 16, 4, 1000)
    for shard in plan.shards:
        units = plan.units(shard, 2 * plan.unit_rows)
        assert units[0].first == 0 and sum(unit.rows for unit in units) == shard.rows
        assert all(a.first + a.rows == b.first for a, b in pairwise(units))
        batches = [batch.tolist() for unit in units for batch in plan.batches(shard, unit.first, unit.rows)]
        assert batches == [batch.tolist() for batch in plan.batches(shard)]
        rows = [
            sum(int(plan.blocks.scored[batch].sum()) for batch in plan.batches(shard, u.first, u.rows)) for u in units
        ]
        assert rows == [unit.rows for unit in units]
    units = [unit for number in range(2) for unit in cut(number, 10, 4)]
    runs = following([units[0], units[2], units[3], units[4]])
    assert [[unit.key for unit in run] for run in runs] == [["0/0"], ["0/2"], ["1/0", "1/1"]]


@pytest.mark.parametrize("units", [1, 7])
def test_a_killed_start_goes_on_within_the_shard(config, undisturbed, monkeypatch, units):
    killed_after(config, units, monkeypatch)
    folder, plan = folder_of(config), job_of(config).plan
    assert list(UnitsFile.read(units_path(folder)).done) == [f"0/{number}" for number in range(units)]
    assert not list(folder.glob("*.npy"))
    assert [problem.split(": ")[1] for problem in verify_datastore(folder)] == ["unfinished"]
    assert write(config)["rows_written"] == plan.rows - units * plan.unit_rows
    assert file_hashes(folder) == undisturbed


def test_what_another_version_cut_otherwise_is_continued(config, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(StorePlan, "unit_rows", property(lambda plan: 3 * 128))
        killed_after(config, 2, monkeypatch)
    assert write(config)["rows_written"] == job_of(config).plan.rows - 2 * 3 * 128
    assert file_hashes(folder_of(config)) == undisturbed


@pytest.mark.parametrize("lost", ["file", "short", "record", "other store"])
def test_units_count_only_with_their_file_and_record(config, undisturbed, monkeypatch, lost):
    killed_after(config, 5, monkeypatch)
    folder = folder_of(config)
    part, record = part_path(folder / "keys-00000.npy"), units_path(folder)
    if lost == "file":
        part.unlink()
    elif lost == "short":
        part.write_bytes(part.read_bytes()[:-1])
    elif lost == "record":
        record.unlink()
    else:
        tree = json.loads(record.read_text())
        UnitsFile(store="0" * 32, unit_rows=tree["unit_rows"], done=tree["done"]).write(record)
    assert write(config)["rows_written"] == job_of(config).plan.rows
    assert file_hashes(folder) == undisturbed


def test_units_in_any_order_by_several_writers_are_one_shard(config, undisturbed):
    """As ranks write them, whose runs end at different times."""
    job = job_of(config)
    model, _ = load_model(job.checkpoint)
    folder, shard = job.folder, job.plan.shards[0]
    folder.mkdir()
    units = job.plan.units(shard)
    assert len(units) > 20
    done: dict[str, list[str]] = {}
    streaks = [Streak() for _ in range(3)]
    for turn in range(len(units)):
        for rank, run in enumerate((units[10:], units[5:10], units[:5])):
            some = run[2 * turn : 2 * turn + 2]
            new = unfinished.write_run(job, lambda *a: put_keys(model, job, *a), streaks[rank], lambda rows: None, some)
            assert not new.whole
            done |= new.done
    assert set(done) == {unit.key for unit in units}
    found = read_back(folder, job.settings, planned_shard(shard), units, done)
    seal(folder, job.settings, found)
    write(config)
    assert file_hashes(folder) == undisturbed


def test_a_lost_write_is_found_and_mended(config, undisturbed, monkeypatch):
    killed_after(config, 9, monkeypatch)
    part = part_path(folder_of(config) / "keys-00000.npy")
    with part.open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"\0\0\0\0")
    with pytest.raises(
        DistlmError, match=r"keys-00000.npy: what several ranks wrote does not read back .* run the same"
    ):
        write(config)
    assert write(config)["rows_written"] == job_of(config).plan.rows
    assert file_hashes(folder_of(config)) == undisturbed


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_kill_while_a_shard_is_put_in_place(config, undisturbed, monkeypatch, renamed):
    """Its sidecar is written, and none, one or both of its files are renamed."""
    write(config)
    folder = folder_of(config)
    store = Datastore.open(folder)
    shard = store.shards[0]
    for name in ("keys-00000.npy", "values-00000.npy")[renamed:]:
        (folder / name).rename(part_path(folder / name))
    write_sidecar(folder, store.manifest.settings, shard)
    tree = dataclasses.replace(store.manifest.settings)
    job = job_of(config)
    planned_manifest(tree, job.plan).write(folder / "manifest.json")
    monkeypatch.setattr(writer, "put_keys", None)
    assert write(config)["rows_written"] == 0
    assert file_hashes(folder) == undisturbed
    put_in_place(folder, tree, shard)
    assert file_hashes(folder) == undisturbed


def test_a_store_that_an_older_version_half_wrote_is_continued(config, tmp_path):
    """It left whole shards with their sidecars, and no record of units."""
    several = dataclasses.replace(config, datastore=dataclasses.replace(config.datastore, rows_per_shard=512))
    write(several)
    folder, before = folder_of(several), file_hashes(folder_of(several))
    store = Datastore.open(folder)
    for shard in store.shards[:3]:
        write_sidecar(folder, store.manifest.settings, shard)
    for shard in store.shards[3:]:
        for name in ("keys", "values"):
            (folder / f"{name}-{shard.index:05d}.npy").unlink()
    (folder / ".keys-00003.npy.node1.4711.tmp").write_bytes(b"half")
    planned_manifest(store.manifest.settings, job_of(several).plan).write(folder / "manifest.json")
    assert write(several)["rows_written"] == store.rows - 3 * 512
    assert file_hashes(folder) == before and not sidecar_path(folder, 0).exists()
