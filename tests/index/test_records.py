"""The records of an index: written, read, read as older versions wrote them, refused when damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.records import check_record, records_of

from distlm.errors import DistlmError
from distlm.index import records
from distlm.index.change.drop import _part_ranges
from distlm.index.merge.copy import MergeLayout
from distlm.index.merge.journal import Journal
from distlm.index.records import (
    ChosenFactory,
    CodesRecord,
    DropRecord,
    ExtendRecord,
    IndexRecord,
    JoinRecord,
    KmeansRecord,
    MergeJournal,
    PartRecord,
    RatesFile,
    TemplateRecord,
    TunedIndex,
)
from distlm.runtime.records import Record

TEMPLATE = """
{"template": "dd98ee69c0c92b035f6a093de4d2ea85", "datastore": "7a69d0d90c3c32f11ea1ff13751719d5",
 "factory_asked": "IVF64,PQ4", "factory": "IVF4,PQ4", "metric": "L2", "width": 32, "nlist": 4, "code_size": 4,
 "sample": 1000, "seed": 1, "faiss": "1.15.1", "bytes": 33460}"""
PART = """
{"template": "dd98ee69c0c92b035f6a093de4d2ea85", "datastore": "7a69d0d90c3c32f11ea1ff13751719d5", "shard": 0,
 "first_id": 0, "rows": 512, "bytes": 39636, "xxh3": "2d4e06be31bca438fc082acfb9ed95f3"}"""
INDEX = """
{"fingerprint": "cd6d32113bb6b9670ff84c590600c9f2", "datastore": "7a69d0d90c3c32f11ea1ff13751719d5",
 "template": "dd98ee69c0c92b035f6a093de4d2ea85", "factory": "IVF4,PQ4", "metric": "L2", "width": 32, "nlist": 4,
 "code_size": 4, "rows": 4311, "parts": 9, "bytes": 85224, "xxh3": "405f87a99c2e849b3cbfc4a4db4e653a",
 "self_found": 1.0}"""
JOINED = """
{"rows": 1024, "bytes": 85224, "xxh3": "405f87a99c2e849b3cbfc4a4db4e653a",
 "trained": "dd98ee69c0c92b035f6a093de4d2ea85", "ids": "keep", "self_found": 0.96875,
 "parts": [{"path": "/run/part-00000.index", "rows": 512, "first_id": 0},
  {"path": "/run/part-00001.index", "rows": 512, "first_id": 512}]}"""
WITH_GAPS = JOINED.replace(', "first_id": 0', "").replace(', "first_id": 512', "")
SMALLER = """
{"rows": 4306, "bytes": 85164, "xxh3": "8670921eb055163f2352a23ec643fcb3", "of": "/run/joined.index",
 "dropped": [[0, 5], [700, 800]]}"""
EXTENDED = """
{"rows": 20, "first_id": 4311, "xxh3": "d585e744da3cb80910cf6f5dc3eeaac8", "extends": "/run/joined.index",
 "keys": [{"path": "/run/k.npy", "rows": 20}]}"""
JOURNAL = '{"key": "16966a6eef6d8dbcc27100cf2e18b5f2", "units": {"0": "405f", "3": "dd98"}}'
CODES = '{"key": "16966a6eef6d8dbcc27100cf2e18b5f2", "done": {"0/0": "405f87a99c2e849b3cbfc4a4db4e653a"}}'
KMEANS = '{"key": "16966a6eef6d8dbcc27100cf2e18b5f2", "iterations": 4, "xxh3": "405f87a99c2e849b3cbfc4a4db4e653a"}'
RATES = """
{"factory": "IVF32,PQ8", "width": 32, "sample": 6000, "rates": {"threads": 2, "add_keys_s": 20000,
 "kmeans_keys_s": 10000.5, "pq_s": 15, "transform_keys_s": Infinity, "transform_fixed_s": 0, "write_bytes_s": 1e9,
 "read_bytes_s": 2e9, "merge_bytes_s": 4e8}}"""
CHOICE = """
{"rows": 4311, "width": 16, "sample": 4096, "max_bytes_per_key": 40, "max_memory": 0.5, "factory": "IVF64,SQ8",
 "why": ["SQ8: 16 bytes of code", "64 lists"]}"""
ONE = """
{"factory": "IVF64,SQ8", "nprobe": 8, "candidates": 32, "key_bytes": 24, "keys": 2000, "lists": 32, "recall": 0.9,
 "query_ms": 0.1, "store_recall": 0.85, "store_ms": 0.2, "rescore_ms": 0.05, "add_keys_s": 100000, "train_s": 0.5,
 "perplexity": null}"""
TUNED = f"""
{{"datastore": "7a69d0d90c3c32f11ea1ff13751719d5", "rows": 4311, "k": 16, "queries": 100, "threads": 2,
 "most_bytes": 40, "most_ms": 0, "least_recall": 0, "pick": {ONE}, "measured": [{ONE}]}}"""
NOTHING = TUNED.replace(f'"pick": {ONE}', '"pick": null')
SAMPLES: list[tuple[type[Record], str]] = [
    (TemplateRecord, TEMPLATE), (PartRecord, PART), (IndexRecord, INDEX), (JoinRecord, JOINED), (JoinRecord, WITH_GAPS),
    (DropRecord, SMALLER), (ExtendRecord, EXTENDED), (CodesRecord, CODES), (MergeJournal, JOURNAL), (RatesFile, RATES),
    (KmeansRecord, KMEANS),
    (ChosenFactory, CHOICE), (TunedIndex, TUNED), (TunedIndex, NOTHING),
]  # fmt: skip
"""As versions wrote them that knew no `format` and, in index.json, no `merged`."""


@pytest.mark.parametrize(("kind", "text"), SAMPLES)
def test_a_record_is_read_as_written_and_each_fault_is_named(kind: type[Record], text: str, tmp_path: Path) -> None:
    check_record(kind.of(json.loads(text), tmp_path), tmp_path / "file.json")


def test_every_record_has_a_sample() -> None:
    assert {kind for kind, _ in SAMPLES} == records_of(records)


def test_an_index_of_before_parts_could_stay_is_one_file(tmp_path: Path) -> None:
    assert IndexRecord.of(json.loads(INDEX), tmp_path).merged


def test_parts_to_drop_are_those_of_a_merge(tmp_path: Path) -> None:
    index, beside = tmp_path / "all.index", tmp_path / "all.index.json"
    beside.write_text(JOINED)
    assert _part_ranges(index, ["part-00001.index", "/run/part-00000.index"]) == [(512, 1024), (0, 512)]
    for other in (WITH_GAPS, SMALLER, EXTENDED):
        beside.write_text(other)
        with pytest.raises(DistlmError, match="its parts are none with ids of their own"):
            _part_ranges(index, ["part-00001.index"])
    beside.write_text(JOINED.replace('"rows": 512', '"rows": "512"'))
    with pytest.raises(DistlmError, match=r"all\.index\.json: not a valid record of a merge.*rows"):
        _part_ranges(index, ["part-00001.index"])


def test_a_merge_that_an_older_version_began_goes_on(tmp_path: Path) -> None:
    part, file = tmp_path / "part.index", tmp_path / ".all.index.tmp"
    part.write_bytes(b"part")
    layout = MergeLayout(b"head", (4,), (part,), np.ones((1, 2), np.int64), 4)
    journal = Journal(file, layout, 100)
    assert journal.load() == {}
    file.write_bytes(bytes(layout.bytes))
    journal.save({0: "405f", 3: "dd98"}, now=True)
    assert journal.load() == {0: "405f", 3: "dd98"}
    kept = json.loads(file.with_name(".all.index.tmp.json").read_text())
    file.with_name(".all.index.tmp.json").write_text(json.dumps({"key": kept["key"], "units": {"0": "405f"}}))
    assert journal.load() == {0: "405f"}
    for text in ("{", json.dumps({**kept, "key": "other"}), json.dumps({**kept, "units": {"first": "405f"}})):
        file.with_name(".all.index.tmp.json").write_text(text)
        assert journal.load() == {}
