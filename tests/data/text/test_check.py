"""Words without end, NUL bytes in rows, and special tokens that a text spells."""

from pathlib import Path

import pytest
from support.foreign.text import write_packed

from distlm.data.text.check import LONGEST_WORD, Spelled, check_row, spelled_note
from distlm.data.text.source import Cutting, FileSource
from distlm.errors import DistlmError


def look(path: Path, data: bytes, specials: tuple[str, ...] = ()) -> dict[str, int]:
    source = FileSource(write_packed(path / "a.txt", data), "a.txt")
    return source.scan(0, Cutting(specials=specials), lambda size: None).spelled


@pytest.mark.parametrize("block", [1000, 20_000, 1 << 20])
@pytest.mark.parametrize("letter", ["a", "\u00f6", "\u4e2d"])
def test_words_of_more_than_64_kib_are_refused_with_their_line(
    tmp_path: Path, letter: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distlm.data.text.stream.BLOCK", block)
    most = LONGEST_WORD // len(letter.encode())
    # White space of all kinds ends a word; so many of the longest allowed are text.
    longest = letter * most
    longer = longest + letter * (LONGEST_WORD - len(longest.encode()) + 1)
    look(tmp_path, f"one\n{longest} {longest}\u3000{longest}\t{longest}\n{longest}".encode())
    with pytest.raises(DistlmError, match=r"a\.txt, line 3: a word of more than 64 KiB"):
        look(
            tmp_path,
            f"one\n{longest}\ntwo {longer} z\nb\n".encode(),
        )
    with pytest.raises(DistlmError, match=r"a\.txt, line 2: a word of more"):
        look(tmp_path, f"one\n{longest * 40}".encode())


def test_rows_are_looked_through_alike() -> None:
    check_row("a " * 100_000, lambda: "row 3")
    for text, words in (("a\0b", "row 3: a NUL byte"), ("b " + "a" * (LONGEST_WORD + 1), "row 3: a word of more")):
        with pytest.raises(DistlmError, match=words):
            check_row(text, lambda: "row 3")


@pytest.mark.parametrize("block", [3, 7, 1 << 20])
def test_special_tokens_are_counted_across_blocks(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.data.text.stream.BLOCK", block)
    text = b"</s> a <|endoftext|>b</s>\n<s></s></s> <|endoftext | > </ s>"
    assert look(tmp_path, text, ("<s>", "</s>", "<|endoftext|>")) == {"</s>": 4, "<s>": 1, "<|endoftext|>": 1}
    assert look(tmp_path, text) == {}


def test_rows_do_not_join_to_a_special_token() -> None:
    spelled = Spelled(["</s>"])
    for row in ("a </", "s> </s>"):
        spelled.add(row)
    assert spelled.counts == {"</s>": 1}
    assert spelled_note({"</s>": 1200, "<s>": 3}).startswith("note: the text spells '</s>' 1,200 times, '<s>' 3 times;")
