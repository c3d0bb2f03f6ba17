"""Texts in .jsonl, .csv and .parquet: the same lines, documents and segments from each."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from support.foreign.text import PACKINGS, write_packed, write_rows

from distlm.data.shards.config import ShardsConfig
from distlm.data.text import sample as text_sample
from distlm.data.text.choice import choice_of_shards
from distlm.data.text.folder import folder_sources
from distlm.data.text.sample import text_bytes, text_start
from distlm.data.text.source import Cutting, Scan
from distlm.errors import DistlmError

ROWS = [f'row {i}, \u00e4 "quoted"' + ("\nits second line, and\r\nthird" if i % 3 == 0 else "") for i in range(40)]
ROWS[5] = ""
NAMES = [*(f"train.jsonl{packing}" for packing in PACKINGS), "train.csv", "train.csv.gz", "train.parquet"]


def quiet(size: int) -> None:
    return None


def source_of(folder: Path, one_line: bool = True, **settings: Any) -> Any:
    choice = choice_of_shards(ShardsConfig(text_dir=str(folder), splits=["train"], **settings))
    return folder_sources(choice, one_line)["train"][0]


def scan(source: Any, least: int = 1, rule: str = "blank_line") -> Scan:
    return source.scan(0, Cutting(source.rule(rule), least), quiet)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_a_document(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, ROWS)
    source = source_of(tmp_path)
    found = scan(source)
    assert len(found.segments) == found.facts.rows == 40 and found.facts.field == "text"
    assert found.facts.text == sum(len(row.encode()) + 1 for row in ROWS) == sum(s.bytes for s in found.segments)
    assert found.lines == sum(row.count("\n") + 1 for row in ROWS)
    assert found.facts.bytes == (tmp_path / name).stat().st_size
    flat = [row.replace("\n", " ") for row in ROWS]
    assert [line for segment in found.segments for line in source.lines(segment, quiet)] == flat
    # Segments of several, out of order.
    larger = scan(source, 200).segments
    assert 3 < len(larger) < 20 and all(segment.bytes >= 200 for segment in larger[:-1])
    for segment in (larger[2], larger[0], larger[-1], larger[1]):
        first = sum(s.start < segment.start for s in found.segments)
        last = sum(s.end <= segment.end for s in found.segments)
        assert list(source.lines(segment, quiet)) == flat[first:last]
    source.close()
    # For token files the lines of a row are lines.
    lines = source_of(tmp_path, one_line=False)
    (whole,) = scan(lines, 1 << 60).segments
    assert list(lines.lines(whole, quiet)) == [line for row in ROWS for line in row.split("\n")]


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train.parquet"])
def test_documents_line_and_title(tmp_path: Path, name: str) -> None:
    lines = [" = A = ", "", "one", "two", "", " = B = ", "", "three"]
    write_rows(tmp_path / name, lines)
    source = source_of(tmp_path, documents="title")
    assert [list(source.lines(segment, quiet)) for segment in scan(source, rule="title").segments] == [
        lines[:5], lines[5:],
    ]  # fmt: skip
    assert source_of(tmp_path, documents="line").rule("line") == "line"


def test_a_file_of_records_may_begin_with_a_mark_and_hold_blank_lines(tmp_path: Path) -> None:
    for name, text in (
        ("train.jsonl", '{"text": "one"}\n\n  \n{"text": "two", "more": [{"text": 3}]}\n\n'),
        ("train.csv", 'text,id\none,1\n\n"two",2\n\n'),
    ):
        path = write_packed(tmp_path / name, b"\xef\xbb\xbf" + text.encode())
        source = source_of(tmp_path)
        segments = scan(source).segments
        assert [list(source.lines(segment, quiet)) for segment in segments] == [["one"], ["two"]]
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
        again = source_of(tmp_path)
        assert [list(again.lines(segment, quiet)) for segment in scan(again).segments] == [["one"], ["two"]]
        path.unlink()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("train.jsonl", b'{"text": "a"}\n{"text": "a"\n', "line 2: not a JSON object"),
        ("train.jsonl", b'{"text": "a"}\n["a"]\n', "line 2: not a JSON object"),
        ("train.jsonl", b'{"id": 1, "body": "a"}\n', "line 1: no field shards.text_field=text; it has id, body"),
        ("train.jsonl", b'\n{"text": null}\n', "line 2: shards.text_field=text holds None, expected text"),
        ("train.jsonl", b'{"text": "a"}\n{"text": "a\\u0000b"}\n', "line 2: a NUL byte"),
        ("train.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        ("train.jsonl", b'{"text": "' + b"x" * 70_000 + b'"}\n', "line 1: a word of more than 64 KiB"),
        (
            "train.jsonl",
            '{"text": "a b c d"}\n'.encode("utf-16"),
            "UTF-16 text, .* iconv -f UTF-16",
        ),
        ("train.csv", b"id,body\n1,a\n", "no column shards.text_field=text; its first line has id, body"),
        ("train.csv", b"id,text\n1,a\n2\n", "line 3: 1 columns, and shards.text_field=text is column 2"),
        ("train.csv", b'id,text\n1,"a\nb\n', "line 3: unexpected end of data"),
        ("train.csv", b"id,text\n1,a\0b\n", "line 2: a NUL byte"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DistlmError, match=f"{name}.*{words}"):
        scan(source_of(tmp_path))


def test_a_long_field_beside_the_text_is_not_a_word(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "a", "image": "' + b"x" * 200_000 + b'"}\n')
    assert scan(source_of(tmp_path)).facts.text == 2


def test_the_field_can_be_chosen(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train.csv", "train.parquet"):
        path = write_rows(tmp_path / name, ["one two"], field="the body")
        assert scan(source_of(tmp_path, text_field="the body")).facts.text == 8
        with pytest.raises(DistlmError, match=r"no (field|column) shards\.text_field=text; .*the body"):
            scan(source_of(tmp_path))
        path.unlink()


def test_parquet_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "train.parquet", ["a", None])
    with pytest.raises(DistlmError, match=r"train\.parquet, row 2: column text holds None, expected text"):
        scan(source_of(tmp_path))
    with pytest.raises(DistlmError, match=r"row 1: column id holds 0, expected text"):
        scan(source_of(tmp_path, text_field="id"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DistlmError, match=r"train\.parquet: damaged or cut \.parquet file"):
        scan(source_of(tmp_path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DistlmError, match=r"\.parquet files need pyarrow: pip install pyarrow"):
        scan(source_of(tmp_path))


@pytest.mark.parametrize("name", [*NAMES, *(f"train.txt{packing}" for packing in PACKINGS)])
def test_a_sample_tells_how_much_text_there_is(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(1)
    rows = [" ".join(str(chance.randrange(10_000)) for _ in range(20)) for _ in range(6000)]
    text = "".join(row + "\n" for row in rows)
    if ".txt" in name:
        write_packed(tmp_path / name, text.encode())
    else:
        write_rows(tmp_path / name, rows, groups=700)
    monkeypatch.setattr("distlm.data.text.sample._SAMPLE", 100_000)
    source = source_of(tmp_path)
    start = text_start([source])
    assert text.startswith(start) and len(start) > 50_000
    assert 0.8 * len(text) < text_bytes([source]) < 1.25 * len(text)


def test_of_many_packed_files_some_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        write_packed(tmp_path / f"train/{number}.txt.gz", b"some words of text\n" * (100 + number))
        write_packed(tmp_path / f"train/{number}.txt", b"some words of text\n" * 100)
    choice = choice_of_shards(ShardsConfig(text_dir=str(tmp_path), splits=["train"]))
    sources = folder_sources(choice)["train"]
    opened: list[str] = []
    real = text_sample._unpacked_size

    def unpacked_size(source: text_sample.FolderSource) -> float:
        opened.append(source.name)
        return real(source)

    monkeypatch.setattr(text_sample, "_unpacked_size", unpacked_size)
    assert 0.9 < text_bytes(sources) / (19 * (900 + 936)) < 1.1
    assert len(opened) == 3


def test_a_plan_refuses_records_without_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", ["a"], field="body")
    with pytest.raises(DistlmError, match=r"train\.jsonl, line 1: no field shards\.text_field=text; it has id, body"):
        text_bytes([source_of(tmp_path)])
