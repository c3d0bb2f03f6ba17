"""How ids of token files look to people: the text that was written, and single tokens of it.

Tokens that are words are shown as they are. Sub-words are decoded by the tokenizer that lies beside the ids: a run of
them is the text that they spell; a single one stands without its blank, and one that hangs on the token before it
without a blank has JOINED in front: `re ·treat ·ed ·,`. What only neighbours make a character of is shown as bytes.
"""

from collections.abc import Sequence
from functools import cache, cached_property
from itertools import groupby

import numpy as np
import numpy.typing as npt

from distlm.data.dictionary import Dictionary
from distlm.data.subwords import FIRST_PIECE, Subwords
from distlm.data.tokens import TokenFiles

Ids = Sequence[int] | npt.NDArray[np.integer]
JOINED = "·"
"""Stands before a piece with no blank between it and the token before."""
BLANK = "␣"
"""Stands for the blanks that belong to a piece, but for the one in front of a word."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_BLANK_BYTE = "Ġ"
"""The blank of byte-level tokenizers."""


class Shown:
    """Ids ↔ text of one folder of token files."""

    def __init__(self, words: Sequence[str], subwords: Subwords | None = None) -> None:
        """`words`: of the dictionary, by id. `subwords`: None where tokens are words."""
        self._words, self._subwords = words, subwords

    @classmethod
    def of(cls, tokens: TokenFiles) -> "Shown":
        """Of token files. Raises DistlmError where the tokenizer that was kept with them cannot be read."""
        facts = tokens.tokenizer
        subwords = Subwords.load(str(tokens.folder), facts.line_end_piece) if facts else None
        return cls(tokens.dictionary.words, subwords)

    @property
    def by_word(self) -> bool:
        """Every token is a word."""
        return self._subwords is None

    def in_text(self, counts: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Which ids a text can hold, bool [V]: </s> and <unk>, and words of train by `counts` [V]. Of sub-words every
        piece but the tokenizer's special tokens, and no <unk>."""
        possible = np.array(counts) > 0
        if self._subwords is not None:
            special, tokenizer = set(self._subwords.specials), self._subwords.tokenizer
            names = tokenizer.get_vocab(with_added_tokens=True)
            possible[:] = False
            possible[[FIRST_PIECE + number for piece, number in names.items() if piece not in special]] = True
            # It is predicted as </s>.
            possible[FIRST_PIECE + self._subwords.line_end] = False
        possible[Dictionary.EOS], possible[Dictionary.UNK] = True, self.by_word
        return possible

    def encode(self, text: str) -> list[int]:
        """Ids of a text, </s> between its lines and none at its end; a word that is not in the dictionary is <unk>."""
        lines = text.split("\n")
        if self._subwords is None:
            parts = [[self._ids.get(word, Dictionary.UNK) for word in line.split()] for line in lines]
        else:
            parts = [encoded.ids.tolist()[:-1] for line in lines for encoded in self._subwords.encode([line])]
        return [i for number, part in enumerate(parts) for i in ([Dictionary.EOS] if number else []) + part]

    def text(self, ids: Ids) -> str:
        """What the ids spell; </s> ends a line."""
        return "\n".join(self._lines(ids))

    def line(self, ids: Ids, before: Ids = ()) -> str:
        """The same in one line, line ends as </s>. `before`: ids in front that are not shown, so that the first token
        keeps the blank that it has after them."""
        if self._subwords is None:
            return " ".join(self._words[int(i)] for i in ids)
        if len(before):
            start, whole = self.line(before), self.line([*before, *ids])
            return whole[len(start) :] if whole.startswith(start) else self.line(ids)
        first, *others = self._lines(ids)
        end = self._words[Dictionary.EOS]
        return " ".join([*filter(None, [first]), *(f"{end} {line}".rstrip() for line in others)])

    def words(self, ids: Ids, before: int | None = None) -> list[str]:
        """Each token alone; the first of a line has no mark. `before`: the id in front of the first."""
        return [JOINED * hangs + text for hangs, text in self.parts(ids, before)]

    def parts(self, ids: Ids, before: int | None = None) -> list[tuple[bool, str]]:
        """The same as (hangs on the token before it, its text)."""
        found = []
        for i, last in zip(ids, [before, *ids], strict=False):
            hangs, text = self._part(int(i))
            found.append((hangs and last != Dictionary.EOS, text))
        return found

    def word(self, token: int) -> str:
        """One token alone, in one line."""
        return self.words([token])[0]

    def _part(self, token: int) -> tuple[bool, str]:
        number = token - FIRST_PIECE
        return (False, self._words[token]) if self._subwords is None or number < 0 else self._piece(number)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self._words)}

    def _lines(self, ids: Ids) -> list[str]:
        """Texts of the lines, the last without an end."""
        lines: list[list[int]] = [[]]
        for i in map(int, ids):
            if i == Dictionary.EOS:
                lines.append([])
            else:
                lines[-1].append(i)
        return [self._spelled(line) for line in lines]

    def _spelled(self, line: Sequence[int]) -> str:
        if self._subwords is None:
            return " ".join(self._words[i] for i in line)
        runs = groupby(line, key=lambda i: i < FIRST_PIECE)
        return "".join(
            "".join(self._words[i] for i in run) if special else self._decode([i - FIRST_PIECE for i in run])
            for special, run in runs
        )

    def _decode(self, numbers: Sequence[int]) -> str:
        assert self._subwords is not None
        text: str = self._subwords.tokenizer.decode(numbers, skip_special_tokens=False)
        return text

    @cached_property
    def _anchor(self) -> list[int]:
        """A piece in front of another, so that its decoder neither drops a blank nor adds one for a text's start."""
        assert self._subwords is not None
        found: list[int] = self._subwords.tokenizer.encode("a", add_special_tokens=False).ids
        return found

    @cache  # noqa: B019 (a few objects in a process, each with a vocabulary)
    def _piece(self, number: int) -> tuple[bool, str]:
        start, both = self._decode(self._anchor), self._decode([*self._anchor, number])
        text = both[len(start) :] if both.startswith(start) else self._decode([number])
        if _BROKEN in text or not text:
            piece = self._words[number + FIRST_PIECE]
            return not piece.startswith(_BLANK_BYTE), _as_bytes(piece.removeprefix(_BLANK_BYTE))
        alone = text.removeprefix(" ")
        escaped = alone.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
        return alone == text, escaped.replace(" ", BLANK) or BLANK


def _as_bytes(piece: str) -> str:
    """A byte-level piece as \\xNN of its bytes; another one as it is called."""
    table = _byte_characters()
    return "".join(f"\\x{table[c]:02x}" for c in piece) if all(c in table for c in piece) else piece


@cache
def _byte_characters() -> dict[str, int]:
    """Character → byte of byte-level tokenizers (Radford et al. 2019): printable ones stand for themselves, the others,
    in order, for the characters from 256 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(rest)}
