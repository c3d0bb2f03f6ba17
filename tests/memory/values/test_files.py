"""A memory's values on disk: written on one cut of the columns, read on another; every way the files can be wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.memory import WIDTH, backward, make, make_table, part_of, reads, settings
from torch import Tensor

from distlm.errors import DistlmError
from distlm.memory.values.files import load_table, save_table
from distlm.memory.values.optimizer import SparseValueOptimizer
from distlm.memory.values.table import ValueTable

EXTRA = {"usage.reads": torch.arange(49), "norm.running_mean": torch.rand(3)}
PLANES = ("values", "exp_avg", "exp_avg_sq")
COUNTERS = ("last_step", "row_steps")


def trained(updates: int = 3, **changes: object) -> ValueTable:
    table, optimizer = make(**changes)
    for update in range(updates):
        backward(table, reads(update))
        optimizer.update()
    return table


def cut(table: ValueTable, columns: int, column: int) -> ValueTable:
    """What the rank of a column would hold of this table."""
    part = ValueTable(table.config, table.width, 4, 0, part_of(columns, column))
    part.updates = table.updates
    for name in PLANES:
        plane = getattr(table, name)
        setattr(part, name, None if plane is None else plane[:, part.first : part.last].clone())
    for name in COUNTERS:
        setattr(part, name, getattr(table, name))
    return part


def save(table: ValueTable, folder: Path, columns: int, layer: int = 4) -> None:
    for column in range(columns):
        save_table(cut(table, columns, column), folder, layer, EXTRA)


def same(mine: Tensor | None, wanted: Tensor | None) -> bool:
    return mine is wanted if mine is None or wanted is None else torch.equal(mine, wanted)


@pytest.mark.parametrize("columns", [1, 2, 5])
@pytest.mark.parametrize("written", [1, 2, 4])
@pytest.mark.parametrize("row_steps", [False, True])
def test_any_cut_is_read_on_any_other(tmp_path: Path, written: int, columns: int, row_steps: bool) -> None:
    table = trained(row_steps=row_steps)
    save(table, tmp_path, written)
    save(make_table(seed=8), tmp_path, written, layer=14)
    for column in range(columns):
        part = make_table(columns=columns, column=column, seed=99, row_steps=row_steps)
        backward(part, reads(5, width=WIDTH // columns)) if columns == 1 else None
        extra = load_table(part, tmp_path, 4)
        wanted = cut(table, columns, column)
        assert all(same(getattr(part, name), getattr(wanted, name)) for name in (*PLANES, *COUNTERS))
        assert part.updates == 3
        assert part.gradient.bytes == 0
        assert extra.keys() == EXTRA.keys()
        assert all(torch.equal(extra[name], EXTRA[name]) for name in EXTRA)


def test_what_the_files_hold(tmp_path: Path) -> None:
    save(trained(), tmp_path, 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["memory-04-00000-00010.safetensors", "memory-04-00010-00020.safetensors"]
    first, second = (load_file(tmp_path / name) for name in names)
    assert set(first) == {*PLANES, "last_step", "extra.usage.reads", "extra.norm.running_mean"}
    assert set(second) == set(PLANES)
    assert second["values"].shape == (49, 10)


def test_one_replica_writes(tmp_path: Path) -> None:
    table = make_table()
    table.exchange.replica = 1
    save_table(table, tmp_path, 4)
    assert not list(tmp_path.iterdir())


def test_before_the_first_update(tmp_path: Path) -> None:
    table = make_table()
    save(table, tmp_path, 2)
    other = trained()
    load_table(other, tmp_path, 4)
    assert torch.equal(other.values, table.values)
    assert other.exp_avg is None
    assert other.updates == 0


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """All that an update depends on is in the files, for every kind of update."""
    kinds: list[dict[str, Any]] = [{}, {"row_steps": True}, {"stale": "catch_up"}]
    for number, changes in enumerate(kinds):
        table = trained(**changes)
        folder = tmp_path / str(number)
        folder.mkdir()
        save(table, folder, 4)
        table, optimizer = make(**changes)
        load_table(table, folder, 4)
        for update in range(3, 6):
            backward(table, reads(update))
            optimizer.update()
        wanted = trained(6, **changes)
        assert all(same(getattr(table, name), getattr(wanted, name)) for name in (*PLANES, *COUNTERS))


FORMS: list[dict[str, Any]] = [
    {}, {"row_steps": True}, {"moments": "bf16"}, {"stale": "catch_up"}, {"stale": "catch_up", "lr": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("new", FORMS, ids=str)
@pytest.mark.parametrize("old", FORMS, ids=str)
def test_values_alone_are_those_that_the_other_training_had(
    tmp_path: Path, old: dict[str, Any], new: dict[str, Any]
) -> None:
    """What the other one owed is for its settings to say, not for those of the one that starts."""
    source = trained(6, **old)
    save(source, tmp_path, 2)
    table = trained(3, **new)
    load_table(table, tmp_path, 4, moments=False, source=source.config)
    source.settle()
    assert torch.equal(table.values, source.values)
    # It goes on as a fresh table with its own settings would.
    fresh, optimizer = make(**new)
    fresh.values.copy_(source.values)
    others = SparseValueOptimizer.of(table.config, [table])
    others.sweep = optimizer.sweep
    for given in map(reads, range(3)):
        for one, steps in ((fresh, optimizer), (table, others)):
            backward(one, given)
            steps.update()
    assert all(same(getattr(table, name), getattr(fresh, name)) for name in (*PLANES, *COUNTERS))


@pytest.mark.parametrize("stale", ["lazy", "catch_up"])
def test_values_alone_start_another_training(tmp_path: Path, stale: str) -> None:
    """Moments and counters are a fresh table's; what stale slots still had to move they have moved."""
    table = trained(6, stale=stale, row_steps=stale == "lazy")
    save(table, tmp_path, 2)
    other = trained(stale=stale, row_steps=stale == "lazy")
    assert load_table(other, tmp_path, 4, moments=False).keys() == EXTRA.keys()
    moved = not torch.equal(other.values, table.values)
    assert moved == (stale == "catch_up")
    table.settle()
    assert torch.equal(other.values, table.values)
    assert other.exp_avg is None
    assert other.exp_avg_sq is None
    assert other.updates == 0
    assert not other.last_step.any()
    assert other.row_steps is None or not other.row_steps.any()


def test_no_files(tmp_path: Path) -> None:
    save(make_table(), tmp_path, 1, layer=8)
    with pytest.raises(DistlmError, match=r"no file memory-04-\*.*no memory of layer 4.*memory\.positions"):
        load_table(make_table(), tmp_path, 4)


@pytest.mark.parametrize(
    ("missing", "found"), [(0, "columns 0 to 5 of 20 are missing"), (2, "10 to 15"), (3, "15 to 20")], ids=str
)
def test_a_missing_range(tmp_path: Path, missing: int, found: str) -> None:
    save(make_table(), tmp_path, 4)
    (tmp_path / f"memory-04-{5 * missing:05d}-{5 * missing + 5:05d}.safetensors").unlink()
    with pytest.raises(DistlmError, match=f"{found}.*memory-04-"):
        load_table(make_table(), tmp_path, 4)


def test_files_of_two_cuts_or_updates(tmp_path: Path) -> None:
    save(make_table(), tmp_path, 2)
    save_table(cut(make_table(), 4, 1), tmp_path, 4)
    with pytest.raises(DistlmError, match="columns 5 to 10 of 20 are in two files"):
        load_table(make_table(), tmp_path, 4)
    (tmp_path / "memory-04-00005-00010.safetensors").unlink()
    save_table(cut(trained(), 2, 1), tmp_path, 4)
    with pytest.raises(DistlmError, match="the files are of different updates"):
        load_table(make_table(), tmp_path, 4)


@pytest.mark.parametrize("bytes_left", [0, 5, 300, -1], ids=str)
def test_a_cut_file(tmp_path: Path, bytes_left: int) -> None:
    save(trained(), tmp_path, 2)
    path = tmp_path / "memory-04-00010-00020.safetensors"
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(DistlmError, match=r"memory-04-00010-00020\.safetensors: cut or damaged"):
        load_table(make_table(), tmp_path, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sub_keys": 8}, "49 slots of 20 values, the model has 64 of 20"), ({"width": 10}, "the model has 49 of 10")],
    ids=str,
)
def test_another_shape(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    save(make_table(), tmp_path, 2)
    with pytest.raises(DistlmError, match=message):
        load_table(make_table(**changes), tmp_path, 4)


def test_a_renamed_file(tmp_path: Path) -> None:
    save(make_table(), tmp_path, 2)
    (tmp_path / "memory-04-00010-00020.safetensors").rename(tmp_path / "memory-04-00010-00019.safetensors")
    with pytest.raises(DistlmError, match="holds 10 columns"):
        load_table(make_table(), tmp_path, 4)


def test_counts_that_were_not_kept(tmp_path: Path) -> None:
    save(trained(), tmp_path, 1)
    with pytest.raises(DistlmError, match=r"memory\.row_steps=false .*false, or start anew with another run_dir="):
        load_table(make_table(row_steps=True), tmp_path, 4)
    load_table(make_table(row_steps=True), tmp_path, 4, moments=False)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=r"memory-04-00000-00020\.safetensors: the memory could not be written"):
        save_table(make_table(), tmp_path / "absent", 4)
    assert settings().sub_keys == 7
