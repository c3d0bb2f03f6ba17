import bz2
import gzip
import hashlib
import lzma
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from distlm.data.shards.config import ShardsConfig
from distlm.data.shards.records import TextFacts
from distlm.data.text.choice import choice_of_shards
from distlm.data.text.folder import folder_sources, sizes_now
from distlm.data.text.opened import open_sources
from distlm.data.text.rows import TableSource
from distlm.data.text.source import Cutting, FileSource, Segment
from distlm.errors import DistlmError

TEXT = "".join(f"line {i} of the text\n" + ("\n" if i % 7 == 0 else "") for i in range(300))


def quiet(size: int) -> None:
    return None


def scan(source: FileSource | TableSource, least: int = 500, rule: str = "blank_line") -> list[Segment]:
    return source.scan(3, Cutting(source.rule(rule), least), quiet).segments


def zstd(path: Path, mode: str) -> Any:
    return pytest.importorskip("zstandard", reason="zstandard is not installed").open(path, mode)


def sources_of(text_dir: Path | str, splits: list[str]) -> dict[str, Any]:
    return folder_sources(choice_of_shards(ShardsConfig(text_dir=str(text_dir), splits=splits)))


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zst": zstd}
    with opened.get(path.suffix, open)(path, "wb") as stream:
        stream.write(data)
    return path


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".bz2", ".zst"])
def test_segments_and_lines_are_those_of_the_text_whatever_the_packing(tmp_path: Path, suffix: str) -> None:
    source = FileSource(write(tmp_path / f"train.txt{suffix}", TEXT.encode()), f"train.txt{suffix}")
    segments = scan(source)
    assert len(segments) > 5 and segments[0].source == 3
    assert segments == scan(FileSource(write(tmp_path / "plain.txt", TEXT.encode()), "plain.txt"))
    told: list[int] = []
    lines = [line for segment in segments for line in source.lines(segment, told.append)]
    assert lines == TEXT.removesuffix("\n").split("\n")
    assert sum(told) == len(TEXT)
    # Out of order, too: a continued run begins anywhere.
    for segment in (segments[4], segments[1]):
        assert "\n".join(source.lines(segment, quiet)) == TEXT[segment.start : segment.end].removesuffix("\n")
    found = source.scan(0, Cutting("blank_line", 500), quiet)
    facts = found.facts
    assert found.lines == TEXT.count("\n") and facts.sha256 == hashlib.sha256(source.path.read_bytes()).hexdigest()
    assert facts.text == len(TEXT) and facts.bytes == (tmp_path / f"train.txt{suffix}").stat().st_size


def test_blank_lines_at_the_ends_of_blocks_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.data.text.stream.BLOCK", 5)
    for text in ("abcd\n\nefgh\n\n\nij", "a\n\n\n\n\n\n\nb\n", "aaaaaaaaaaaaaaaaa\nö\n\n", "\n\n"):
        source = FileSource(write(tmp_path / "a.txt", text.encode()), "a.txt")
        size = len(text.encode())
        assert list(source.lines(Segment(0, 0, size, size), quiet)) == text.removesuffix("\n").split("\n")
        source.close()


def test_the_three_forms_of_a_split(tmp_path: Path) -> None:
    write(tmp_path / "train/b.txt.gz", b"b\n")
    write(tmp_path / "train/a/z.txt", b"z\n")
    write(tmp_path / "train/.hidden.txt", b"h\n")
    write(tmp_path / "train/README.md", b"r\n")
    write(tmp_path / "valid.txt.xz", b"v\n")
    write(tmp_path / "wiki.test.tokens", b"t\n")
    found = sources_of(tmp_path, ["train", "valid", "test"])
    assert {split: [source.name for source in sources] for split, sources in found.items()} == {
        "train": ["train/a/z.txt", "train/b.txt.gz"], "valid": ["valid.txt.xz"], "test": ["wiki.test.tokens"],
    }  # fmt: skip


def test_subfolders_are_read_through_links_once_and_not_where_they_are_hidden(tmp_path: Path) -> None:
    write(tmp_path / "scratch/part/deep/x.txt", b"x\n")
    write(tmp_path / "text/train/own/a.txt", b"a\n")
    write(tmp_path / "text/train/.ipynb_checkpoints/a-checkpoint.txt", b"a\n")
    write(tmp_path / "text/train/own/.cache/deep/b.txt", b"b\n")
    (tmp_path / "text/train/linked").symlink_to(tmp_path / "scratch/part")
    (tmp_path / "text/train/again").symlink_to("own")
    (tmp_path / "text/train/own/round").symlink_to("..")
    (tmp_path / "text/train/z.txt").symlink_to(tmp_path / "scratch/part/deep/x.txt")
    (tmp_path / "text/train/gone").symlink_to("nowhere")
    (found,) = sources_of(tmp_path / "text", ["train"]).values()
    wanted = ["train/linked/deep/x.txt", "train/own/a.txt", "train/z.txt"]
    assert [source.name for source in found] == wanted
    assert {*sizes_now(tmp_path / "text", wanted[:1])} == {*wanted}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], r"train.txt: no such file .the train split.; put it there .*shards.splits"),
        (["train.txt", "train.txt.xz"], r"more than once \(train.txt, train.txt.xz\)"),
        (["train.txt", "train/a.txt"], r"more than once \(train.txt, train\)"),
        (["train/a.dat"], "no text files"),
    ],
)
def test_a_folder_that_will_not_do(tmp_path: Path, files: list[str], words: str) -> None:
    for name in files:
        write(tmp_path / name, b"a\n")
    with pytest.raises(DistlmError, match=words):
        sources_of(tmp_path, ["train"])


def test_no_folder() -> None:
    for text_dir, words in (("", "shards.text_dir is empty"), ("/nowhere", "no such folder")):
        with pytest.raises(DistlmError, match=words):
            sources_of(text_dir, ["train"])


def test_damaged_and_wrong_files_are_named(tmp_path: Path) -> None:
    packed = lzma.compress(TEXT.encode() * 20)
    (tmp_path / "cut.txt.xz").write_bytes(packed[:-40])
    (tmp_path / "flipped.txt.gz").write_bytes(b"\x1f\x8b" + b"\0" * 50)
    write(tmp_path / "latin.txt", b"fine\nalso fine\n na\xefve\n")
    write(tmp_path / "end.txt", b"fine\ncut \xc3")
    for name, words in (
        ("cut.txt.xz", "damaged or cut"), ("flipped.txt.gz", "damaged or cut"),
        ("latin.txt", "latin.txt, line 3: not UTF-8 text .byte 0xef"), ("end.txt", "end.txt, line 2: not UTF-8"),
    ):  # fmt: skip
        with pytest.raises(DistlmError, match=words):
            scan(FileSource(tmp_path / name, name))


def test_a_text_that_shrinks_after_the_scan_is_noticed(tmp_path: Path) -> None:
    source = FileSource(write(tmp_path / "a.txt", TEXT.encode()), "a.txt")
    last = scan(source)[-1]
    write(tmp_path / "a.txt", TEXT.encode()[: last.start + 5])
    with pytest.raises(DistlmError, match="not what it was"):
        list(source.lines(last, quiet))


def table(rows: list[Any], whole: bool = False) -> TableSource:
    facts = TextFacts(name="train", sha256="", text=0)
    return TableSource(facts, "set, train", len(rows), lambda start, end: iter(rows[start:end]), whole)


@pytest.mark.parametrize("rule", ["blank_line", "title", "line"])
def test_rows_of_a_table_are_lines(rule: str) -> None:
    rows = [line + "\n" for line in ["a", "", " = A = ", "", "one two", "three", "", " = B = ", "", "four"] * 4]
    source = table(rows)
    segments = scan(source, 20, rule)
    assert len(segments) > 2 and segments[0].start == 0 and segments[-1].end == len(rows)
    assert all(before.end == after.start for before, after in pairwise(segments))
    for segment in segments[1:]:
        before, first = rows[segment.start - 1], rows[segment.start]
        assert {"blank_line": before == "\n", "title": first.startswith(" = ") and before == "\n", "line": True}[rule]
    assert sum(segment.bytes for segment in segments) == sum(map(len, rows))
    assert [line for segment in segments for line in source.lines(segment, quiet)] == [row[:-1] for row in rows]


def test_rows_of_a_table_are_documents() -> None:
    source = table(["one\n\ntwo", "three\n", "four"], whole=True)
    assert [segment.end for segment in scan(source, 1, "whole")] == [1, 2, 3]
    assert list(source.lines(Segment(0, 0, 2, 0), quiet)) == ["one  two", "three"]


def test_a_row_that_is_no_text() -> None:
    with pytest.raises(DistlmError, match="set, train, row 2: holds None"):
        scan(table(["a", None]))


def test_the_demo_corpus_knows_its_documents() -> None:
    sources = open_sources(choice_of_shards(ShardsConfig(source="demo", splits=["valid"])))
    lines = list(sources["valid"][0].lines(Segment(0, 0, 2, 0), quiet))
    assert len(lines) == 2 and all(line.startswith(" = ") for line in lines)
