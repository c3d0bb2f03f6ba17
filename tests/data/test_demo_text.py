import bz2
from importlib import metadata
from pathlib import Path

import pytest

from distlm.data import demo_text
from distlm.data.demo_text import DemoText
from distlm.data.wikitext import article_lines, strip_markup, tokenise


@pytest.fixture(scope="module")
def demo() -> DemoText:
    path, why = demo_text.find_excerpt()
    if path is None:
        pytest.skip(f"no Wikipedia excerpt: {why}")
    return demo_text.demo_text()


def test_demo_corpus_has_106_articles_and_the_recorded_words(demo: DemoText) -> None:
    assert demo.description.articles == {"train": 95, "valid": 6, "test": 5}
    assert sum(demo.description.articles.values()) == 106
    assert {split: sum(len(line.split()) for line in lines) for split, lines in demo.lines.items()} == {
        "train": 468_451, "valid": 25_688, "test": 26_174,
    }  # fmt: skip
    spelled = sum(any(c.isalnum() for c in word) for lines in demo.lines.values() for x in lines for word in x.split())
    assert 0.9 < spelled / 442_000 < 1.1
    assert demo.description.fallback is None and "CC BY-SA" in demo.description.licence


def test_demo_splits_are_whole_articles_with_no_common_title_and_near_90_5_5(demo: DemoText) -> None:
    titles = {
        split: [line for line in lines if line.startswith(" = ") and not line.startswith(" = =")]
        for split, lines in demo.lines.items()
    }
    assert {split: len(names) for split, names in titles.items()} == demo.description.articles
    assert len(set().union(*titles.values())) == 106
    words = {split: sum(len(line.split()) for line in lines) for split, lines in demo.lines.items()}
    share = {split: count / sum(words.values()) for split, count in words.items()}
    assert abs(share["train"] - 0.9) < 0.01 and abs(share["valid"] - 0.05) < 0.005 and abs(share["test"] - 0.05) < 0.005


def test_demo_text_is_free_of_markup(demo: DemoText) -> None:
    lines = [line for rows in demo.lines.values() for line in rows]
    for mark in ("{ {", "} }", "[ [", "] ]", "< ref", "''", "__", "http"):
        assert not any(mark in line for line in lines), mark
    assert all(line.strip() for line in lines)


def test_demo_corpus_never_imports_gensim(demo: DemoText) -> None:
    import sys

    assert "gensim" not in sys.modules


def test_without_gensim_falls_back_to_help_texts_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> object:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo_text.metadata, "distribution", missing)
    found = demo_text.demo_text()
    assert found.description.source == "pydoc_data.topics" and found.description.licence == "PSF-2.0"
    said = capsys.readouterr().err
    assert "gensim is not installed" in said and "pip install " in said and "[demo]" in said
    assert all(found.lines[split] for split in ("train", "valid", "test"))
    assert sum(len(line.split()) for line in found.lines["train"]) > 30_000


def test_another_excerpt_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / Path(demo_text.EXCERPT).name
    other.write_bytes(bz2.compress(b"<mediawiki/>"))

    class File:
        def as_posix(self) -> str:
            return demo_text.EXCERPT

        def locate(self) -> Path:
            return other

    class Gensim:
        files = (File(),)

    monkeypatch.setattr(demo_text.metadata, "distribution", lambda name: Gensim())
    path, why = demo_text.find_excerpt()
    assert path is None and f"expected {demo_text.EXCERPT_SHA256}" in why
    other.unlink()
    assert demo_text.find_excerpt() == (None, f"{other} is missing")


def test_wikitext_is_stripped_to_words() -> None:
    text = (
        "{{Infobox|a={{nested|x}}|b={x}}}<!-- note -->\n"
        "'''Bold''' is a [[link target|linked]] [[word]].<ref name=\"a\">{{cite|t}} out</ref><ref name=b/>\n"
        "[[File:x.jpg|thumb|A [[caption]] here]]\n"
        "{| class=wikitable\n| cell {| inner |} || 2\n|}\n"
        "== Empty ==\n== Full ==\n=== Deep ===\n* An item [http://x.org with label] &amp; U.S. 1,000.5 don't\n"
        "== References ==\n{{reflist}}\n* Gone\n=== Sub ===\nGone too\n== After ==\nStays\n[[Category:X]]\n[[fr:Y]]"
    )
    assert list(article_lines("A title (x)", text)) == [
        " = A title ( x ) = ",
        "Bold is a linked word .",
        " = = Full = = ",
        " = = = Deep = = = ",
        "An item with label & U.S. 1,000.5 don't",
        " = = After = = ",
        "Stays",
    ]


def test_unclosed_markup_ends() -> None:
    assert strip_markup("{{open [[also <ref>no end") == "{{open [[also  no end"


def test_tokenise_keeps_words_whole_and_case() -> None:
    assert tokenise('He said: "Non-EU, 3.14%..." (e.g. x)') == 'He said : " Non-EU , 3.14 % ... " ( e.g. x )'
