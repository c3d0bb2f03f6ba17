"""The demo corpus: 106 Wikipedia articles inside the gensim 4.4.0 wheel, or Python's own help texts without it."""

import bz2
import hashlib
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from distlm.data.records import DemoSource
from distlm.data.tokens import SPLITS
from distlm.data.wikitext import article_lines, tokenise
from distlm.installed import install
from distlm.runtime.progress import say

EXCERPT = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
EXCERPT_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
# Of every 20 articles in dump order, this one is held out. Picked so that words split near 90/5/5 %.
HELD_OUT = {1: "valid", 6: "test"}


@dataclass(frozen=True)
class DemoText:
    """Lines of each split, and what they are."""

    lines: dict[str, list[str]]
    description: DemoSource


def demo_text() -> DemoText:
    """The demo corpus, split by whole articles (train, valid, test).

    Falls back to `pydoc_data.topics` of the standard library, and says so, when gensim's file is missing or other
    than expected. Takes about a second and 50 MB.
    """
    path, why = find_excerpt()
    if path is None:
        say(
            f"demo corpus: {why}; using Python's help texts instead (far fewer words, other results); "
            f"for the Wikipedia articles: {install('demo')}"
        )
        lines, articles = _split(list(help_articles()))
        python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
        return DemoText(
            lines,
            DemoSource(source="pydoc_data.topics", python=python, licence="PSF-2.0", fallback=why, articles=articles),
        )
    lines, articles = _split(list(wikipedia_articles(path)))
    return DemoText(
        lines,
        DemoSource(
            source=f"gensim {EXCERPT.rpartition('/')[2]}", sha256=EXCERPT_SHA256,
            licence="CC BY-SA 3.0 (Wikipedia contributors)", fallback=None, articles=articles,
        ),
    )  # fmt: skip


def find_excerpt() -> tuple[Path | None, str]:
    """The excerpt's path and "", or None and the reason. Looks into the installed files; never imports gensim."""
    try:
        files = metadata.distribution("gensim").files or []
    except metadata.PackageNotFoundError:
        return None, "gensim is not installed"
    for file in files:
        if file.as_posix() == EXCERPT:
            path = Path(str(file.locate()))
            if not path.is_file():
                return None, f"{path} is missing"
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != EXCERPT_SHA256:
                return None, f"{path} has sha256 {found}, expected {EXCERPT_SHA256} (gensim 4.4.0)"
            return path, ""
    return None, f"the installed gensim has no {EXCERPT}"


def wikipedia_articles(path: Path) -> Iterator[list[str]]:
    """Lines of each article of a MediaWiki XML dump (bz2), in dump order, redirects left out."""
    with bz2.open(path) as stream:
        for _, page in ElementTree.iterparse(stream):
            if page.tag.rpartition("}")[2] != "page":
                continue
            text = page.findtext("{*}revision/{*}text")
            if page.find("{*}redirect") is None and page.findtext("{*}ns") == "0" and text:
                yield list(article_lines(page.findtext("{*}title") or "", text))
            page.clear()


def help_articles() -> Iterator[list[str]]:
    """Lines of each topic of Python's help, in alphabetical order: a heading, then one line per paragraph."""
    from pydoc_data import topics

    for name in sorted(topics.topics):
        paragraphs = (tokenise(part) for part in topics.topics[name].split("\n\n"))
        yield [f" = {name} = ", *(words for words in paragraphs if words)]


def _split(articles: list[list[str]]) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Lines and number of articles of each split."""
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    number = dict.fromkeys(SPLITS, 0)
    for index, article in enumerate(articles):
        split = HELD_OUT.get(index % 20, "train")
        lines[split] += article
        number[split] += 1
    return lines, number
