"""How ids of token files look to people: the text that was written, and single tokens of it.

Tokens that are words are shown as they are. Sub-words are decoded by the tokenizer that lies beside the ids: a run of
them is the text that they spell; a single one stands without its blank, and one that hangs on the token before it
without a blank has JOINED in front: `re ·treat ·ed ·,`. What only neighbours make a character of is shown as bytes.
"""

from collections.abc import Sequence
from functools import cache, cached_property
from itertools import groupby

from distlm.data.dictionary import Dictionary
from distlm.data.subwords import FIRST_PIECE, Subwords
from distlm.data.tokens import TokenFiles

JOINED = "·"
"""Stands before a piece with no blank between it and the token before."""
BLANK = "␣"
"""Stands for the blanks that belong to a piece, but for the one in front of a word."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Shown:
    """Ids ↔ text of one folder of token files. Ids are int [any]; they may be NumPy's."""

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

    def encode(self, text: str) -> list[int]:
        """Ids of a text, </s> between its lines and none at its end; a word that is not in the dictionary is <unk>."""
        lines = text.split("\n")
        if self._subwords is None:
            parts = [[self._ids.get(word, Dictionary.UNK) for word in line.split()] for line in lines]
        else:
            parts = [encoded.ids.tolist()[:-1] for line in lines for encoded in self._subwords.encode([line])]
        return [i for number, part in enumerate(parts) for i in ([Dictionary.EOS] if number else []) + part]

    def text(self, ids: Sequence[int]) -> str:
        """What the ids spell; </s> ends a line."""
        return self._spelled(ids, "\n")

    def line(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
        """The same in one line, with line ends as </s>. `before`: ids in front, which are not shown but decide whether
        the first token stands alone."""
        if self._subwords is None or not len(before):
            return self._spelled(ids, f" {self._words[Dictionary.EOS]} ").strip(" ")
        start, whole = self.line(before), self.line([*before, *ids])
        return whole[len(start) :] if whole.startswith(start) else self.line(ids)

    def words(self, ids: Sequence[int], before: int | None = None) -> list[str]:
        """Each token alone; the first of a line has no mark. `before`: the id in front of the first."""
        return [
            self.word(i).removeprefix(JOINED) if last == Dictionary.EOS and not self.by_word else self.word(i)
            for last, i in zip([before, *ids], ids, strict=False)
        ]

    def word(self, token: int) -> str:
        """One token alone, in one line."""
        number = int(token) - FIRST_PIECE
        return self._words[int(token)] if self._subwords is None or number < 0 else self._piece(number)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self._words)}

    def _spelled(self, ids: Sequence[int], line_end: str) -> str:
        if self._subwords is None:
            lines: list[list[str]] = [[]]
            for i in ids:
                lines.append([]) if i == Dictionary.EOS else lines[-1].append(self._words[int(i)])
            return line_end.join(map(" ".join, lines))
        found = ""
        for special, run in groupby(map(int, ids), key=lambda i: i < FIRST_PIECE):
            if special:
                found += "".join(line_end if i == Dictionary.EOS else self._words[i] for i in run)
            else:
                found += self._decode([i - FIRST_PIECE for i in run])
        return found

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
    def _piece(self, number: int) -> str:
        start, both = self._decode(self._anchor), self._decode([*self._anchor, number])
        text = both[len(start) :] if both.startswith(start) else self._decode([number])
        if _BROKEN in text or not text:
            return JOINED + _as_bytes(self._words[number + FIRST_PIECE])
        alone = text.removeprefix(" ")
        escaped = alone.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
        escaped = escaped.replace(" ", BLANK)
        return (escaped or BLANK) if alone != text else JOINED + escaped


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
