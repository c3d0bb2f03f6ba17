import random
from pathlib import Path

import pytest

from distlm.data.documents import CUTS, PIECE, cuts, documents


def split(text: str, rule: str) -> list[str]:
    """Whole documents, empty ones left out."""
    found, held = [], []
    for part, ends in documents(text.split("\n"), rule):
        held.append(part)
        if ends:
            found.append(" ".join(held))
            held = []
    assert not held, "the last piece ends a document"
    return [" ".join(document.split()) for document in found if document.strip()]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("blank_line", ["a b", "= T =", "c", "d = x ; = y", "e"]),
        ("title", ["a b", "= T = c d = x ; = y e"]),
        ("line", ["a", "b", "= T =", "c", "d", "= x ; = y", "e"]),
        ("whole", ["a b = T = c d = x ; = y e"]),
    ],
)
def test_where_documents_end(rule: str, expected: list[str]) -> None:
    # " = x ; = y" is no title: nothing blank is around it.
    assert split("a\nb\n \n = T = \n\nc\n\n\nd\n = x ; = y\n\ne", rule) == expected


def test_titles_are_of_the_first_level_and_stand_alone() -> None:
    text = " = One = \n \n a \n \n = = Section = = \n \n b \n = Legend = \n c \n \n = 2 = 1 + 1 = \n \n d \n"
    assert split(text, "title") == ["= One = a = = Section = = b = Legend = c", "= 2 = 1 + 1 = d"]


def test_a_long_document_comes_in_pieces() -> None:
    line = "word " * 1000
    parts = list(documents([line] * 500 + ["", "end"], "blank_line"))
    assert [ends for _, ends in parts] == [False, False, True, True]
    assert max(len(text) for text, _ in parts) < PIECE + 2 * len(line)
    assert sum(text.count("word") for text, _ in parts) == 500_000


@pytest.mark.parametrize("rule", sorted(CUTS))
def test_a_cut_is_the_end_of_a_document(rule: str) -> None:
    """Also where cuts lie across the blocks of a file."""
    chance = random.Random(5)
    for _ in range(60):
        lines = chance.choices(["", " ", "a", "bb cc", " = T = ", " = = S = = ", "ü" * 9, "\t"], k=chance.randrange(80))
        text = "\n".join(lines).encode()
        edge = chance.randrange(1, 30)
        blocks = [text[i : i + edge] for i in range(0, len(text), edge)]
        least = chance.randrange(1, 60)
        places = [place for place in cuts(blocks, rule, least) if place < len(text)]
        assert places == [place for place in cuts([text], rule, least) if place < len(text)]
        parts = [text[i:j] for i, j in zip([0, *places], [*places, len(text)], strict=True)]
        assert all(len(part) >= least for part in parts[:-1])
        pieces = [document for part in parts for document in split(part.decode().removesuffix("\n"), rule)]
        assert pieces == split(text.decode(), rule)
        if rule == "whole":
            assert places == []


def test_each_cut_is_the_first_that_is_far_enough() -> None:
    assert list(cuts([b"one line\n\n" * 500], "blank_line", 100)) == list(range(100, 5001, 100))
    assert list(cuts([b"one line\n" * 500], "line", 18)) == list(range(18, 4501, 18))
    article = b" = A = \n\ntext\n\n"
    assert list(cuts([article * 50], "title", 1)) == list(range(len(article), 50 * len(article), len(article)))


@pytest.mark.data
def test_wikitext_has_its_articles(wikitext2: Path) -> None:
    """600, 60 and 60 articles (Merity et al. 2016, table 1)."""
    for name, articles in (("train", 600), ("valid", 60), ("test", 60)):
        found = split((wikitext2 / f"{name}.txt").read_text("utf-8"), "title")
        assert len(found) == articles and all(document.startswith("= ") for document in found)
