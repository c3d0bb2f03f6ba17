"""Wikitext markup to plain words: templates, references, tables, links and tags go, paragraphs and headings stay."""

import html
import re
from collections.abc import Callable, Iterator

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_DROPPED_TAGS = "ref|math|gallery|timeline|source|syntaxhighlight|score|imagemap|pre|code|chem"
_EMPTY_TAG = re.compile(rf"<({_DROPPED_TAGS})\b[^<>]*/>", re.IGNORECASE)
_DROPPED = re.compile(rf"<({_DROPPED_TAGS})\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
# Innermost first: each pass removes the ones that hold no other.
_TEMPLATE = re.compile(r"\{\{(?:[^{}]|\{(?!\{)|\}(?!\}))*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\]]*\s*([^\]\n]*)\]")
_URL = re.compile(r"\b(?:https?|ftp)://\S+")
_NO_TEXT = re.compile(r"\s*:?\s*(?:file|image|category|media|wikt|[a-z]{2,3}(?:-[a-z]+)*):", re.IGNORECASE)
_BROKEN_FILE = re.compile(r"^\[\[(?:File|Image):.*$", re.MULTILINE | re.IGNORECASE)
_QUOTES = re.compile(r"'{2,}")
_MAGIC = re.compile(r"__[A-Z]+__")
_HEADING = re.compile(r"^(={2,6})\s*(.+?)\s*\1\s*$")
_LIST_MARK = re.compile(r"^[*#:;]+\s*")
_TOKEN = re.compile(r"\d+(?:[.,]\d+)+|(?:[^\W\d_]\.){2,}|\w+(?:['’\-–]\w+)*|\.\.\.|[^\w\s]")
_APPARATUS = {"see also", "references", "notes", "footnotes", "further reading", "external links", "bibliography",
              "sources", "citations", "notes and references"}  # fmt: skip
_HAS_WORD = re.compile(r"\w")


def article_lines(title: str, wikitext: str) -> Iterator[str]:
    """Lines of one article: ` = Title = `, ` = = Section = = `, and one line of words per paragraph or list item.

    Headings with nothing under them are left out, and so are the sections of references and links.
    """
    yield f" = {tokenise(title)} = "
    waiting: list[tuple[int, str]] = []
    skipped_level = 0
    for line in strip_markup(wikitext).split("\n"):
        heading = _HEADING.match(line.strip())
        if heading:
            level = len(heading[1])
            if not skipped_level or level <= skipped_level:
                skipped_level = level if heading[2].lower() in _APPARATUS else 0
            waiting = [item for item in waiting if item[0] < level]
            mark = " ".join("=" * level)
            waiting.append((level, f" {mark} {tokenise(heading[2])} {mark} "))
            continue
        if skipped_level:
            continue
        words = tokenise(_LIST_MARK.sub("", line.strip()))
        # What is left of a template or table row has no words, or starts with its bar.
        if _HAS_WORD.search(words) and not line.lstrip().startswith(("|", "!", "{", "}")):
            yield from (text for _, text in waiting)
            waiting = []
            yield words


def strip_markup(wikitext: str) -> str:
    """The text without comments, references, templates, tables, files, categories, tags; links become their labels."""
    text = _COMMENT.sub("", wikitext)
    text = _DROPPED.sub("", _EMPTY_TAG.sub("", text))
    text = _until_stable(_TEMPLATE, "", text)
    text = _until_stable(_TABLE, "", text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _until_stable(_LINK, _label, text)
    text = _TAG.sub(" ", _URL.sub("", _BROKEN_FILE.sub("", text)))
    return html.unescape(_QUOTES.sub("", _MAGIC.sub("", text)))


def tokenise(text: str) -> str:
    """Words and punctuation marks separated by single spaces; numbers and inner hyphens, apostrophes kept whole."""
    return " ".join(_TOKEN.findall(text))


def _label(link: re.Match[str]) -> str:
    inside = link[1]
    if _NO_TEXT.match(inside):
        return ""
    return inside.rpartition("|")[2]


def _until_stable(pattern: re.Pattern[str], replacement: str | Callable[[re.Match[str]], str], text: str) -> str:
    while True:
        text, count = pattern.subn(replacement, text)
        if not count:
            return text
