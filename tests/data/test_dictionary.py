from collections import Counter
from pathlib import Path

import pytest

from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError

COUNTS = Counter({"b": 3, "a": 3, "the": 9, "Z": 3, "rare": 1, "<unk>": 50, "é": 3})


def test_specials_come_first_then_words_by_count_with_ties_in_code_point_order() -> None:
    dictionary = Dictionary.from_counts(COUNTS, pad_to_multiple=1)
    assert dictionary.words == ["<s>", "<pad>", "</s>", "<unk>", "the", "Z", "a", "b", "é", "rare"]
    assert dictionary.counts == [0, 0, 0, 0, 9, 3, 3, 3, 3, 1]
    assert [dictionary.encode(word) for word in ("the", "<unk>", "rare", "unheard")] == [4, 3, 9, 3]


def test_order_does_not_depend_on_the_order_of_reading() -> None:
    backwards = Counter(dict(reversed(COUNTS.items())))
    assert Dictionary.from_counts(backwards).hash == Dictionary.from_counts(COUNTS).hash


def test_min_count_and_max_words_leave_words_out() -> None:
    assert Dictionary.from_counts(COUNTS, min_count=3, pad_to_multiple=1).words[4:] == ["the", "Z", "a", "b", "é"]
    assert Dictionary.from_counts(COUNTS, max_words=2, pad_to_multiple=1).words[4:] == ["the", "Z"]


def test_padded_with_unused_words_to_a_multiple() -> None:
    dictionary = Dictionary.from_counts(COUNTS, pad_to_multiple=8)
    assert len(dictionary) == 16
    assert dictionary.words[10:] == [f"madeupword{i:04d}" for i in range(6)]
    assert dictionary.counts[10:] == [0] * 6


def test_padding_passes_over_a_padding_name_that_is_a_word_of_the_text() -> None:
    dictionary = Dictionary.from_counts({"madeupword0000": 2}, pad_to_multiple=8)
    assert dictionary.words[4:] == ["madeupword0000", "madeupword0001", "madeupword0002", "madeupword0003"]


def test_saved_and_loaded_the_same_with_specials_left_out(tmp_path: Path) -> None:
    dictionary = Dictionary.from_counts(COUNTS)
    dictionary.save(tmp_path / "dict.txt")
    assert (tmp_path / "dict.txt").read_text("utf-8").startswith("the 9\nZ 3\n")
    loaded = Dictionary.load(tmp_path / "dict.txt")
    assert (loaded.words, loaded.counts, loaded.hash) == (dictionary.words, dictionary.counts, dictionary.hash)


def test_hash_tells_another_order_apart() -> None:
    assert Dictionary(["a", "b"], [1, 1]).hash != Dictionary(["b", "a"], [1, 1]).hash


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a 3\nb\n", "line 2: expected 'word count', found 'b'"),
        ("a 3\nb x\n", "line 2: expected 'word count'"),
        ("a 3\n\nb 1\n", "line 2: expected 'word count'"),
        ("a 3\nb 2\na 1\n", "line 3: 'a' appears a second time"),
        ("</s> 3\n", "line 1: '</s>' appears a second time"),
    ],
)
def test_bad_file_is_refused_naming_the_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "dict.txt").write_text(text)
    with pytest.raises(DistlmError, match=complaint):
        Dictionary.load(tmp_path / "dict.txt")


def test_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match="distlm data prepare"):
        Dictionary.load(tmp_path / "dict.txt")
