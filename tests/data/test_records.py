"""The records of token files and of shards: written, read, read as older versions wrote them, refused when damaged."""

import json
from pathlib import Path

import pytest
from support.records import check_record, records_of

from distlm.data import records as token_records
from distlm.data.records import TokensMeta
from distlm.data.shards import records as shard_records
from distlm.data.shards.files import ShardsManifest, ShardsPlan, Unit, belonging, read_marker, write_marker
from distlm.data.shards.records import ManifestFile, Marker, PlanFile
from distlm.errors import DistlmError
from distlm.runtime.records import Record

FILES = """
{"dtype": "int32", "vocabulary": 64, "types": 62, "dictionary": "dcc3d01340d9bea87a6ae0a387c133d7",
 "splits": {"train": {"tokens": 4343, "lines": 400, "unk": 0, "hash": "572c67c475d99d2ba1dace0dcb423ff4"}},
 "settings": {"source": "folder", "text_dir": "/text", "min_count": 1, "max_words": 12000, "pad_to_multiple": 8},
 "source": {"source": "folder", "files": {"train": {"name": "train.txt", "bytes": 13329, "sha256": "41c4"}}},
 "edition": null}"""
HUB = """
{"dtype": "int32", "vocabulary": 304, "types": 62, "dictionary": "dcc3",
 "splits": {"train": {"tokens": 9000, "lines": 400, "unk": 0, "hash": "572c", "words": 4343}},
 "settings": {"source": "hub", "hub_name": "a/b", "hub_config": "", "hub_field": "text", "tokenizer": "77aa"},
 "source": {"source": "hub", "hub": {"name": "a/b", "config": "", "field": "text", "rows": {"train": 400},
  "datasets": "3.1"}},
 "edition": null, "tokenizer": {"hash": "77aa", "pieces": 300, "line_end": 198, "line_end_piece": "Ċ"}}"""
DEMO = """
{"dtype": "int32", "vocabulary": 12008, "types": 31000, "dictionary": "dcc3",
 "splits": {"train": {"tokens": 477392, "lines": 9000, "unk": 70, "hash": "572c"}},
 "settings": {"source": "demo", "dictionary": "99ff"},
 "source": {"source": "demo", "demo": {"source": "gensim excerpt", "sha256": "a53f", "licence": "CC BY-SA 3.0",
  "fallback": null, "articles": {"train": 95}}},
 "edition": {"name": "WikiText-2", "compared": ["token counts"], "differences": ["train has …"], "exact": false}}"""
MANIFEST = """
{"kind": "distlm shards", "dtype": "uint16", "chunk": "offset bytes rows xxh3-128",
 "unit": "source,start,end,bytes of each piece of text of a shard",
 "tokenizer": {"vocabulary": 1000, "hash": "cc5e", "lower_case": true, "pad": 0, "unk": 1, "cls": 2, "sep": 3,
  "mask": 4},
 "settings": {"source": "demo", "splits": ["valid"], "documents": "blank_line", "lower_case": true, "row_tokens": 128,
  "cross_documents": true, "chunk_rows": 4, "shard_text": 2000000, "vocabulary": "", "vocabulary_size": 1000,
  "vocabulary_text": 1000000000},
 "text": {"valid": [{"name": "valid", "source": "gensim excerpt", "sha256": "9a2a", "licence": "CC BY-SA 3.0",
  "fallback": null, "articles": {"valid": 6}, "rows": 6, "text": 149266}]},
 "splits": {"valid": {"rows": 8, "tokens": 900, "documents": 6, "shards": [{"name": "valid-00000", "bytes": 235520,
  "xxh3": "fc2e", "rows": 8, "tokens": 900, "documents": 6, "chunks": ["512 1152 4 90cb", "2560 1152 4 7138"]}]}},
 "units": {"valid": ["0,0,4,140000 0,4,6,9266"]}}"""
PLAN = """
{"settings": {"source": "folder", "splits": ["train", "valid", "test"], "documents": "blank_line", "lower_case": true,
  "row_tokens": 16, "cross_documents": true, "chunk_rows": 4, "shard_text": 3000, "vocabulary": "",
  "vocabulary_size": 80, "vocabulary_text": 1000000000},
 "text": {"train": [{"name": "train.txt", "bytes": 13329, "text": 13329,
   "sha256": "41c4a2b79daa7ebb4f1e59d035f4e1ead33ffd47efffbddf2dc4dc4a4054014d"}],
  "valid": [{"name": "valid.txt", "bytes": 1692, "text": 1692,
   "sha256": "93ca635f33f749b09d20844b2467ccf9bc8deea3afb0c2d03b4dd16dcbeb76ec"}],
  "test": [{"name": "test.txt", "bytes": 1729, "text": 1729,
   "sha256": "3c4410f95d373aa429037f0d8f1a228c70d555445ec75addea3ef326ae636100"}]},
 "units": {"train": [[[0, 0, 3363, 3363]], [[0, 3363, 6907, 3544]], [[0, 6907, 10148, 3241]],
   [[0, 10148, 13329, 3181]]],
  "valid": [[[0, 0, 1692, 1692]]], "test": [[[0, 0, 1729, 1729]]]}}"""
MARKER = """
{"belongs": "939465181d31d8c5a5fafc37d8112819", "name": "valid-00000", "bytes": 3, "xxh3": "abae", "rows": 8,
 "tokens": 511, "documents": 5, "chunks": ["512 256 4 a03f", "1536 256 4 8164"]}"""
SAMPLES: list[tuple[type[Record], str]] = [
    (TokensMeta, FILES), (TokensMeta, HUB), (TokensMeta, DEMO), (ManifestFile, MANIFEST), (PlanFile, PLAN),
    (Marker, MARKER),
]  # fmt: skip
"""As versions without the field `format` wrote them."""


@pytest.mark.parametrize(("kind", "text"), SAMPLES)
def test_a_record_is_read_as_written_and_each_fault_is_named(kind: type[Record], text: str, tmp_path: Path) -> None:
    check_record(kind.of(json.loads(text), tmp_path), tmp_path / "file.json")


def test_every_record_has_a_sample() -> None:
    assert {kind for kind, _ in SAMPLES} == records_of(token_records) | records_of(shard_records)


def test_a_shard_that_an_older_version_marked_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".plan.json").write_text(PLAN)
    plan = ShardsPlan.read(tmp_path / ".plan.json")
    facts = shard_records.Tokenizer(80, "0123", True, 0, 1, 2, 3, 4)
    # Of json_hash([the plan as it lies there, "0123"]) by a version whose plans had no format.
    owner = belonging(plan, facts)
    assert owner == "c26b694c680e07a230eecbc72566ce47"
    (tmp_path / ".valid-00000.json").write_text(MARKER.replace("939465181d31d8c5a5fafc37d8112819", owner))
    (tmp_path / "valid-00000.tar").write_bytes(b"abc")
    unit = plan.units["valid"][0]
    shard = read_marker(tmp_path, owner, unit)
    assert shard is not None and (shard.rows, len(shard.chunks)) == (8, 2)
    write_marker(tmp_path, owner, shard)
    assert read_marker(tmp_path, owner, unit) == shard
    assert read_marker(tmp_path, "other", unit) is None and read_marker(tmp_path, owner, Unit("test", 0, ())) is None


@pytest.mark.parametrize(
    ("old", "new"), [('"512 1152', '"512'), ('"0,0,4,140000', '"0,0,4'), ('"rows": 8, "tokens"', '"rows": 9, "tokens"')]
)
def test_numbers_that_a_manifest_cannot_have_are_refused(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "manifest.json").write_text(MANIFEST.replace(old, new, 1))
    with pytest.raises(DistlmError, match=r"manifest\.json: not a valid manifest of shards.*edited or is damaged"):
        ShardsManifest.read(tmp_path)
