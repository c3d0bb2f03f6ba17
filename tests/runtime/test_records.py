"""Every record: what it writes it reads, and a file that is not one is refused by name."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.records.examples import example, mistyped

from distlm.datastore.records import Manifest
from distlm.errors import DistlmError
from distlm.files_page import records
from distlm.runtime.records import Record

# A datastore's manifest has rules between its shards, which a made-up example breaks: tests/datastore/test_records.py.
PLAIN = [kind for kind in records() if kind is not Manifest]
EVERY = pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.json"


def refusal(kind: type[Record], tree: Any, path: Path) -> str:
    path.write_text(json.dumps(tree), "utf-8")
    with pytest.raises(DistlmError) as caught:
        kind.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert kind.peek(path) is None
    return str(caught.value)


@EVERY
def test_what_is_written_is_read_and_written_again_alike(kind: type[Record], path: Path) -> None:
    record = example(kind)
    record.write(path)
    before = path.read_bytes()
    found = kind.read(path)
    assert found == record and json.loads(before)["format"] == kind.FORMAT
    found.write(path)
    assert path.read_bytes() == before
    path.write_text(record.line(), "utf-8")
    assert kind.peek(path) == record


@EVERY
def test_a_file_from_before_there_was_a_format_is_the_first(kind: type[Record], path: Path) -> None:
    tree = example(kind).tree()
    del tree["format"]
    if kind.FORMAT == 1:
        path.write_text(json.dumps(tree), "utf-8")
        assert kind.read(path) == example(kind)


@EVERY
def test_a_newer_format_is_refused_by_its_number(kind: type[Record], path: Path) -> None:
    said = refusal(kind, example(kind).tree() | {"format": kind.FORMAT + 1}, path)
    assert f"of format {kind.FORMAT + 1}, this version of distlm reads {kind.FORMAT}" in said


@EVERY
def test_unknown_missing_and_mistyped_fields_are_named(kind: type[Record], path: Path) -> None:
    whole = example(kind).tree() | {"format": kind.FORMAT}
    assert "`unheard_of`" in refusal(kind, whole | {"unheard_of": 1}, path)
    for field in msgspec.structs.fields(kind):
        if field.required and field.encode_name in whole:
            without = {name: value for name, value in whole.items() if name != field.encode_name}
            assert f"`{field.encode_name}`" in refusal(kind, without, path)
    for name, wrong in mistyped(kind):
        if name in whole:
            assert name in refusal(kind, whole | {name: wrong}, path)


@EVERY
def test_a_cut_file_and_one_of_something_else_are_refused(kind: type[Record], path: Path) -> None:
    refusal(kind, ["a", "list"], path)
    path.write_text(json.dumps(example(kind).tree())[:-3], "utf-8")
    with pytest.raises(DistlmError, match="not valid JSON"):
        kind.read(path)
    assert kind.peek(path) is None
    path.unlink()
    with pytest.raises(DistlmError, match="no such file"):
        kind.read(path)
    assert kind.peek(path) is None
