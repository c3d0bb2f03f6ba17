"""Every record on disk, edited or damaged in every way: equal, or refused in one line that names file and field."""

import importlib
import json
import os
import pkgutil
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz import command, has_manners, times
from support.fuzz.json_files import HARMFUL, HARMLESS, edited
from support.manifest import write_complete_manifest
from support.records import records_of
from support.records.examples import example
from support.shared import searched

import distlm
import launchers
from distlm.config.load import dump_config
from distlm.datastore.manifest import MANIFEST
from distlm.datastore.records import Manifest
from distlm.errors import DistlmError
from distlm.runtime.records import CHECK, Record, checksum

Factory = pytest.TempPathFactory


def all_records() -> list[type[Record]]:
    """Every class of a record, of every room."""
    found: set[type[Record]] = set()
    for package in (distlm, launchers):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.rpartition(".")[2] == "records":
                found |= {kind for kind in records_of(importlib.import_module(module.name)) if hasattr(kind, "WHAT")}
    return sorted(found, key=lambda kind: (kind.__module__, kind.__name__))


RECORDS = all_records()


def written(kind: type[Record], folder: Path) -> tuple[Record, Path]:
    """A record with something in every field, and its file."""
    path = folder / f"{kind.__name__}.json"
    if kind is Manifest:
        # Its shards follow one another.
        write_complete_manifest(folder)
        (folder / MANIFEST).replace(path)
        return kind.read(path), path
    record = example(kind)
    record.write(path)
    return record, path


def test_all_records_are_found() -> None:
    assert len(RECORDS) > 40 and len({kind.__name__ for kind in RECORDS}) == len(RECORDS)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_a_file_that_is_no_such_record(kind: type[Record], tmp_path: Path) -> None:
    record, path = written(kind, tmp_path)
    before = path.read_bytes()
    for name, damage in HARMFUL.items():
        if name == "an empty object" and kind.upgraded({}) is not None:
            # Of an older format, which is read as if there were nothing.
            continue
        path.write_bytes(damage(before))
        with pytest.raises(DistlmError) as caught:
            kind.read(path)
        assert str(path) in str(caught.value) and kind.WHAT in str(caught.value), (name, str(caught.value))
        assert kind.peek(path) is None
    for change in HARMLESS.values():
        path.write_bytes(change(before))
        assert kind.read(path) == kind.peek(path) == record


@pytest.mark.parametrize("sort", ["folder", "pipe", "device", "dangling link", "link loop"])
def test_what_is_no_file(sort: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    {
        "folder": lambda: path.mkdir(), "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"),
        "dangling link": lambda: path.symlink_to("nowhere"), "link loop": lambda: path.symlink_to(path),
    }[sort]()  # fmt: skip
    for kind in RECORDS[:3]:
        with pytest.raises((DistlmError, OSError), match=rf"{path}"):
            kind.read(path)
        assert kind.peek(path) is None


def entries(data: st.DataObject, folder: Path) -> None:
    """An entry of any record, removed or with another value."""
    kind = data.draw(st.sampled_from(RECORDS))
    _, path = written(kind, folder)
    before = path.read_bytes()
    path.write_bytes(data.draw(edited(before)))
    now = json.loads(path.read_bytes())
    try:
        found = kind.read(path)
    except DistlmError as error:
        assert str(path) in str(error) and "\n" not in str(error), str(error)
        return
    rest = {name: value for name, value in now.items() if name != CHECK}
    assert now[CHECK] == checksum(rest), "it was changed, and that was not seen"
    found.write(path)
    assert kind.read(path) == found


READERS = {
    "tokens": ("data prepare", "evaluate", "knn evaluate"), "checkpoints": ("evaluate", "knn evaluate"),
    "datastore": ("datastore info", "datastore verify", "index build", "knn tune"),
    "index": ("index info", "index merge", "knn search"), "neighbours": ("knn tune", "knn search", "report"),
    "tuned": ("knn evaluate", "report"), "results": ("report",), "losses": ("report words --before lm --after knn",),
    "knn.json": ("knn evaluate",), "results.json": ("report",), "code.json": ("report",),
}  # fmt: skip
"""Place in a run → commands that read it."""
_MADE = {"index build": "index", "knn search": "neighbours"}


def readers(data: st.DataObject, factory: Factory, folder: Path) -> None:
    """A record of a run, edited: what verify and its readers say."""
    config = searched(factory)
    shutil.rmtree(folder, ignore_errors=True)
    run = folder / "run"
    shutil.copytree(config.run_dir, run)
    config.run_dir = str(run)
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_config(config), "utf-8")
    path = run / data.draw(st.sampled_from([str(path.relative_to(run)) for path in _records(run)]))
    before = path.read_bytes()
    damaged = st.sampled_from([*HARMFUL.values(), *HARMLESS.values()]).map(lambda change: change(before))
    path.write_bytes(data.draw(st.one_of(edited(before), edited(before), edited(before), damaged)))
    verb = data.draw(st.sampled_from(READERS[path.relative_to(run).parts[0]]))
    if (made := _MADE.get(verb)) and made not in path.relative_to(run).parts:
        shutil.rmtree(run / made)
    has_manners(command("verify", run))
    has_manners(command(*verb.split(), recipe))


def _records(run: Path) -> Iterator[Path]:
    return (
        path for path in sorted(run.rglob("*.json"))
        if path.relative_to(run).parts[0] in READERS and not path.name.startswith(".")
    )  # fmt: skip


@times(200)
@given(data=st.data())
def test_an_entry_of_a_record(data: st.DataObject, tmp_path_factory: Factory) -> None:
    entries(data, tmp_path_factory.getbasetemp())


@times(6)
@given(data=st.data())
def test_readers(data: st.DataObject, tmp_path_factory: Factory) -> None:
    readers(data, tmp_path_factory, tmp_path_factory.getbasetemp() / "fuzz-readers")


@pytest.mark.slow
@times(400)
@given(data=st.data())
def test_readers_at_length(data: st.DataObject, tmp_path_factory: Factory) -> None:
    readers(data, tmp_path_factory, tmp_path_factory.getbasetemp() / "fuzz-readers")
