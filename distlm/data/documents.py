"""Documents of running text: where they end, in a stream of lines and in raw bytes."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain

PIECE = 1 << 20
"""A longer document comes in pieces of about so many characters."""
_TITLE_LINE = r" = [^=\n](?:[^\n]*[^=\n])? = ?\r?"
_TITLE = re.compile(_TITLE_LINE)
_BLANK = rb"\n[ \t\r]*\n"
CUTS: dict[str, re.Pattern[bytes] | None] = {
    "blank_line": re.compile(_BLANK),
    "title": re.compile(_BLANK + rb"(?=" + _TITLE_LINE.encode() + _BLANK + rb")"),
    "line": re.compile(rb"\n"),
    "whole": None,
}
"""Rule (shards.documents) → what a file may be cut behind: always the end of a document. None: it is not cut."""


def documents(lines: Iterable[str], rule: str) -> Iterator[tuple[str, bool]]:
    """(text, whether the document ends here): the documents of some lines, in pieces where they are long.

    `lines` begin a document and end one. Lines come out joined by spaces, blank ones left out. Documents without text
    may come out empty.
    """
    held: list[str] = []
    size, begun, after_blank = 0, False, True
    waiting: str | None = None
    # A title is known by the blank line behind it, so each line waits for the next.
    for following in chain(lines, (None,)):
        line, waiting = waiting, following
        if line is None:
            continue
        blank = is_blank(line)
        before = rule == "title" and after_blank and is_title(line, following)
        if before and begun:
            yield " ".join(held), True
            held, size, begun = [], 0, False
        if not blank:
            held.append(line)
            size, begun = size + len(line), True
        if begun and (rule == "line" or (rule == "blank_line" and blank)):
            yield " ".join(held), True
            held, size, begun = [], 0, False
        elif size > PIECE:
            yield " ".join(held), False
            held, size = [], 0
        after_blank = blank
    if begun:
        yield " ".join(held), True


def is_blank(line: str) -> bool:
    """Nothing but white space."""
    return not line.strip()


def is_title(line: str, following: str | None) -> bool:
    """A line of the form " = Title = " with a blank line behind it: with a blank line before it, it begins an article
    of WikiText (table legends of that form do not stand alone)."""
    return _TITLE.fullmatch(line) is not None and following is not None and is_blank(following)


def cuts(blocks: Iterable[bytes], rule: str, at_least: int) -> Iterator[int]:
    """Where a text is cut into pieces of `at_least` bytes or a little more, in bytes from its start. Each cut is the
    first end of a document that is `at_least` bytes behind the cut before it. The text's end may be the last.

    `blocks` are the text's bytes in order. Holds about one block, or one line, in memory.
    """
    pattern = CUTS[rule]
    shortest = 1 if rule == "line" else 2
    held, first, last = b"", 0, 0
    waiting: list[bytes] = []
    for block in blocks:
        if pattern is None:
            continue
        # A line of many blocks is looked through once.
        waiting.append(block)
        if b"\n" not in block:
            continue
        held = b"".join([held, *waiting])
        waiting = []
        while match := pattern.search(held, max(last + at_least - first - shortest, 0)):
            last = first + match.end()
            yield last
        # Keep what a later block may complete to a cut: a title needs up to three line ends.
        keep = len(held)
        for _ in range(3):
            keep = max(held.rfind(b"\n", 0, keep), 0)
        held, first = held[keep:], first + keep
