"""The records of a datastore: written, read, read as older versions wrote them, refused when damaged."""

import json
from pathlib import Path

import pytest
from support.records import check_record, records_of

from distlm.datastore import records
from distlm.datastore.manifest import read_sidecar, shard_files, write_sidecar
from distlm.datastore.records import Manifest, Shard, Sidecar, UnitsFile
from distlm.errors import DistlmError
from distlm.runtime.records import Record

MANIFEST = """
{"kind": "distlm datastore", "complete": false, "rows": 700, "value_dtype": "int32", "split": "train",
 "tap": "last_ffn_input", "rows_per_shard": 512, "key_dtype": "float16", "width": 32, "vocabulary": 64,
 "model": "6eebdecf50db50a9515f2c04402a3b12", "dictionary": "dcc3d01340d9bea87a6ae0a387c133d7",
 "tokens": "c0af6ca58a8f7890d0aeb8e5f600d415",
 "context": {"context_window": 32, "block": 32, "batch_blocks": 4,
  "rule": "the first 32 tokens are not stored; each stored token is seen with 32 to 63 tokens before it"},
 "shards": [{"index": 0, "first_row": 0, "rows": 512, "token_start": 32, "token_end": 544,
   "keys_xxh3": "6f6d9b2802dd9fb183c8b9597d9c3105", "values_xxh3": "40f23969c73236421b0caeb39238b487", "done": true},
  {"index": 1, "first_row": 512, "rows": 188, "token_start": 544, "token_end": 732, "keys_xxh3": null,
   "values_xxh3": null, "done": false}]}"""
SIDECAR = """
{"store": "STORE", "index": 0, "first_row": 0, "rows": 512, "token_start": 32, "token_end": 544,
 "keys_hash": "6f6d9b2802dd9fb183c8b9597d9c3105", "values_hash": "40f23969c73236421b0caeb39238b487"}"""
UNITS = """
{"store": "STORE", "unit_rows": 128, "done": {"1/0": ["6f6d9b2802dd9fb183c8b9597d9c3105",
 "40f23969c73236421b0caeb39238b487"]}}"""
SAMPLES: list[tuple[type[Record], str]] = [(Manifest, MANIFEST), (Sidecar, SIDECAR), (UnitsFile, UNITS)]
"""As versions without the field `format` wrote them."""


@pytest.mark.parametrize(("kind", "text"), SAMPLES)
def test_a_record_is_read_as_written_and_each_fault_is_named(kind: type[Record], text: str, tmp_path: Path) -> None:
    check_record(kind.of(json.loads(text), tmp_path), tmp_path / "file.json")


def test_every_record_has_a_sample() -> None:
    assert {kind for kind, _ in SAMPLES} == records_of(records)


def test_fingerprints_are_those_of_older_versions(tmp_path: Path) -> None:
    """An index built from a store, and a shard half a store ago, must go on belonging to it."""
    manifest = Manifest.of(json.loads(MANIFEST), tmp_path)
    assert manifest.settings.hash == "adbe65bde27e0e1462565a8193c97b43"
    assert manifest.fingerprint == "c17faa692645a02b986cdd544861b789"


def test_a_shard_that_an_older_version_marked_is_taken_over(tmp_path: Path) -> None:
    manifest = Manifest.of(json.loads(MANIFEST), tmp_path)
    settings, done = manifest.settings, manifest.shards[0]
    planned = Shard(0, 0, 512, 32, 544)
    for path, header, size, _ in shard_files(tmp_path, settings, planned):
        path.write_bytes(header + bytes(size - len(header)))
    (tmp_path / ".shard-00000.json").write_text(SIDECAR.replace("STORE", settings.hash))
    assert read_sidecar(tmp_path, settings, planned) == done
    write_sidecar(tmp_path, settings, done)
    assert read_sidecar(tmp_path, settings, planned) == done
    (tmp_path / ".shard-00000.json").write_text(SIDECAR)
    assert read_sidecar(tmp_path, settings, planned) is None


def test_a_shard_is_done_when_both_files_are(tmp_path: Path) -> None:
    tree = json.loads(MANIFEST)
    tree["shards"][1]["done"] = True
    assert not Manifest.of(tree, tmp_path).shards[1].done
    with pytest.raises(DistlmError, match="complete=True, and lists 700 rows in 1 written shards"):
        Manifest.of({**tree, "complete": True}, tmp_path)
