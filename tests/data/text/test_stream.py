"""Bytes of text files: byte order marks, line ends, encodings, damage, and commands that mend."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from support.foreign.text import PACKINGS, packed, write_packed

from distlm.data.text.source import Cutting, FileSource, Scan, Segment
from distlm.errors import DistlmError


def scan(source: FileSource, least: int = 1 << 60, rule: str = "line") -> Scan:
    return source.scan(0, Cutting(rule, least), lambda size: None)


def lines_of(path: Path) -> list[str]:
    source = FileSource(path, path.name)
    found = [line for segment in scan(source, 8).segments for line in source.lines(segment, lambda size: None)]
    source.close()
    return found


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, packing: str) -> None:
    text = "one two\nthree \ufeff four\n\nfive\n"
    marked = FileSource(write_packed(tmp_path / f"a.txt{packing}", b"\xef\xbb\xbf" + text.encode()), "a.txt")
    found = scan(marked, 8)
    assert found.segments == scan(FileSource(write_packed(tmp_path / "b.txt", text.encode()), "b.txt"), 8).segments
    assert found.lines == 4 and found.facts.text == len(text.encode())
    # Elsewhere it is a character of the text; and a segment may be read without those before it.
    assert lines_of(marked.path) == ["one two", "three \ufeff four", "", "five"]
    assert next(marked.lines(found.segments[1], lambda size: None)) == "three \ufeff four"


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("block", [4, 1 << 20])
def test_lines_that_end_in_cr_alone_are_lines(
    tmp_path: Path, packing: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distlm.data.text.stream.BLOCK", block)
    text = "one two\n\nthree\n = T = \n\nfour"
    path = write_packed(tmp_path / f"a.txt{packing}", b"\xef\xbb\xbf" + text.replace("\n", "\r").encode())
    assert lines_of(path) == text.split("\n")
    assert scan(FileSource(path, path.name)).lines == 6


def test_cr_beside_newlines_stays_as_it_is(tmp_path: Path) -> None:
    path = write_packed(tmp_path / "a.txt", b"one\r\ntwo\r\rthree\nfour\r")
    assert lines_of(path) == ["one\r", "two\r\rthree", "four\r"]


def run(command: str) -> None:
    subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], check=True)


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_another_encoding_is_named_and_the_command_converts_it(tmp_path: Path, encoding: str, packing: str) -> None:
    text = "some na\u00efve words\nand a second line\n"
    path = write_packed(tmp_path / f"my text.txt{packing}", text.encode(encoding))
    name = {"utf-16": "UTF-16", "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32": "UTF-32"}.get(encoding)
    with pytest.raises(DistlmError, match=f"{name} text, not UTF-8" if name else "line 1: not UTF-8 text") as raised:
        lines_of(path)
    run(str(raised.value).rpartition(": ")[2])
    assert lines_of(path) == text.split("\n")[:2]
    assert [path.name for path in tmp_path.iterdir()] == [f"my text.txt{packing}"]


def test_nul_bytes_are_named_with_their_line_and_the_command_drops_them(tmp_path: Path) -> None:
    path = write_packed(tmp_path / "a.txt", b"one\ntwo\nth\0ree\n")
    with pytest.raises(DistlmError, match=r"a\.txt, line 3: a NUL byte") as raised:
        lines_of(path)
    run(str(raised.value).rpartition("without its NUL bytes: ")[2])
    assert lines_of(path) == ["one", "two", "three"]


@pytest.mark.parametrize("packing", PACKINGS[1:])
def test_a_cut_or_damaged_file_is_never_taken_for_a_whole_one(tmp_path: Path, packing: str) -> None:
    whole = packed(random.Random(0).randbytes(30_000).hex().encode() + b"\n", packing)
    for number, data in enumerate((whole[:-9], whole[: len(whole) // 2], b"no " + whole)):
        (tmp_path / f"{number}.txt{packing}").write_bytes(data)
        with pytest.raises(DistlmError, match=rf"{number}\.txt{packing}: damaged or cut compressed file"):
            scan(FileSource(tmp_path / f"{number}.txt{packing}", "a.txt"))


def test_zst_without_its_library_names_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"anything")
    with pytest.raises(DistlmError, match=r"\.zst files need zstandard: pip install zstandard"):
        scan(FileSource(tmp_path / "a.txt.zst", "a.txt.zst"))


def test_two_readers_of_one_source_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.data.text.stream.BLOCK", 8)
    lines = [f"line {number}" for number in range(40)]
    for packing in ("", ".gz"):
        path = write_packed(tmp_path / f"a.txt{packing}", "\n".join(lines).encode())
        source = FileSource(path, path.name)
        (whole,) = scan(source).segments
        one, other = (source.lines(whole, lambda size: None) for _ in range(2))
        pairs = list(zip(one, other, strict=True))
        assert pairs == [(line, line) for line in lines]
        assert list(source.lines(Segment(0, 0, 7, 7), lambda size: None)) == ["line 0"]


def test_a_line_of_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.data.text.stream.BLOCK", 16)
    path = write_packed(tmp_path / "a.txt", b"word " * 1000 + b"\nend")
    assert lines_of(path) == ["word " * 1000, "end"]
