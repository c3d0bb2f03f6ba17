"""Text that cannot be meant is refused with its place: NUL bytes, words without end. Special tokens are counted."""

import codecs
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distlm.data.text.stream import not_utf8, rewriting
from distlm.errors import DistlmError

LONGEST_WORD = 1 << 16
"""Bytes of UTF-8. Longer ones are binary data; a dictionary of them would fill the memory."""
_WHITE = re.compile(r"\s")
# A character has up to four bytes, so a word that is too long covers one of the windows at multiples of this.
_WINDOW = LONGEST_WORD // 8


class Spelled:
    """How often a text spells out each of some special tokens."""

    def __init__(self, specials: Sequence[str] = ()) -> None:
        self.counts: Counter[str] = Counter()
        names = sorted(filter(None, specials), key=lambda name: (-len(name), name))
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self._longest = len(names[0]) if names else 0
        self._before = ""

    def add(self, text: str, goes_on: bool = False) -> None:
        """Count in `text`; with `goes_on` it continues the one before."""
        if self._pattern is None:
            return
        before = self._before if goes_on else ""
        found = self._pattern.finditer(before + text) if before else self._pattern.finditer(text)
        self.counts.update(match[0] for match in found if match.end() > len(before))
        self._before = (before + text)[-self._longest + 1 :] if self._longest > 1 else ""


def spelled_note(counts: Mapping[str, int]) -> str:
    """One line for people about what `Spelled` found."""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{name!r} {count:,} times" for name, count in most[:5])
    return f"note: the text spells {shown}{', …' if len(most) > 5 else ''}; that stays text and is no special token"


class TextCheck:
    """Looks through the bytes of a file as they come. Raises DistlmError naming file and line."""

    def __init__(self, path: Path, spelled: Spelled, words: bool = True) -> None:
        """`words`: refuse those longer than LONGEST_WORD."""
        self._path, self._spelled, self._words = path, spelled, words
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._line, self._word = 1, 0
        self._ended = True

    @property
    def lines(self) -> int:
        """Lines so far; a last one without its end counts."""
        return self._line - self._ended

    def add(self, block: bytes, last: bool = False) -> None:
        """The next bytes; `last`: the text ends with them."""
        try:
            text = self._decoder.decode(block, last)
        except UnicodeDecodeError as error:
            line = self._line + error.object[: error.start].count(b"\n")
            raise not_utf8(self._path, line, error.object[error.start]) from error
        if not text:
            return
        if (zero := text.find("\0")) >= 0:
            place = f"{self._path}, line {self._line + text.count(chr(10), 0, zero)}"
            mend = rewriting(self._path, "tr -d '\\000'")
            raise DistlmError(f"{_nul(place)}; without its NUL bytes: {mend}")
        if self._words:
            self._add_words(text)
        self._spelled.add(text, goes_on=True)
        self._line += text.count("\n")
        self._ended = text[-1] == "\n"

    def _add_words(self, text: str) -> None:
        """Words may go on from one block to the next."""
        first = "" if text[0].isspace() else text.split(maxsplit=1)[0]
        self._word += len(first.encode())
        self._refuse_long(self._word, 0, text)
        if len(first) == len(text):
            return
        if long := _long_word(text):
            self._refuse_long(len(long.encode()), text.index(long), text)
        self._word = 0 if text[-1].isspace() else len(text.rsplit(maxsplit=1)[-1].encode())

    def _refuse_long(self, size: int, at: int, text: str) -> None:
        if size > LONGEST_WORD:
            raise DistlmError(_endless(f"{self._path}, line {self._line + text.count(chr(10), 0, at)}"))


def check_row(text: str, place: Callable[[], str]) -> None:
    """Refuse NUL and endless words in a text of its own; `place` names it."""
    if "\0" in text:
        raise DistlmError(_nul(place()))
    if len(text) > _WINDOW and (long := _long_word(text)) and len(long.encode()) > LONGEST_WORD:
        raise DistlmError(_endless(place()))


def _long_word(text: str) -> str:
    """The longest word where one might exceed LONGEST_WORD, else ''."""
    windows = range(0, len(text) - _WINDOW + 1, _WINDOW)
    if all(_WHITE.search(text, start, start + _WINDOW) for start in windows):
        return ""
    return max(text.split(), key=lambda word: len(word.encode()), default="")


def _nul(place: str) -> str:
    return f"{place}: a NUL byte, which no text has; this is binary data, or text that was damaged"


def _endless(place: str) -> str:
    return (
        f"{place}: a word of more than {LONGEST_WORD // 1024} KiB (nothing in it is white space); this is binary data, "
        "or text that needs its spaces and line ends: mend or remove it"
    )
