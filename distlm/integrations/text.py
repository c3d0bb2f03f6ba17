"""Text as ids of a dictionary and back: words between spaces, or pieces of a tokenizer; a newline is always </s>."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from distlm.data.dictionary import Dictionary
from distlm.data.subwords import FIRST_PIECE, Subwords

Ids = npt.NDArray[np.integer]


class Codec(Protocol):
    """One way of cutting text."""

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """int32 [tokens]; the last line ends with </s> only where the text ends with a newline."""

    def decode(self, ids: Ids) -> str:
        """The text of some ids; </s> is a newline."""

    def ends(self, token: int) -> bool:
        """Whether a text is over where the model predicts this id."""


@dataclass(frozen=True)
class Words:
    """Words of a dictionary, as token files without a tokenizer have them."""

    dictionary: Dictionary

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """As Codec."""
        lines = ([*map(self.dictionary.encode, line.split()), Dictionary.EOS] for line in text.split("\n"))
        return _of_lines(lines)

    def decode(self, ids: Ids) -> str:
        """As Codec; one space between words."""
        return "\n".join(" ".join(self.dictionary.words[i] for i in line) for line in _lines(ids))

    def ends(self, token: int) -> bool:
        """As Codec: at no word."""
        return False


@dataclass(frozen=True)
class Pieces:
    """Pieces of a tokenizer, as sub-word token files have them."""

    subwords: Subwords

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """As Codec."""
        return _of_lines(encoded.ids.tolist() for encoded in self.subwords.encode(text.split("\n")))

    def decode(self, ids: Ids) -> str:
        """As Codec."""
        rows = ([i - FIRST_PIECE for i in line if i >= FIRST_PIECE] for line in _lines(ids))
        return "\n".join(self.subwords.tokenizer.decode(line, skip_special_tokens=False) for line in rows)

    def ends(self, token: int) -> bool:
        """As Codec: at a special token of the tokenizer; the piece that ends a line is predicted as </s>."""
        return token - FIRST_PIECE in self._specials

    @cached_property
    def _specials(self) -> set[int]:
        """Their pieces."""
        return {self.subwords.tokenizer.token_to_id(name) for name in self.subwords.specials}


def _of_lines(lines: Iterable[list[int]]) -> npt.NDArray[np.int32]:
    # The text behind its last newline is no whole line.
    return np.array([i for line in lines for i in line][:-1], np.int32)


def _lines(ids: Ids) -> list[list[int]]:
    """The ids between </s>."""
    found: list[list[int]] = [[]]
    for i in np.asarray(ids).tolist():
        if i == Dictionary.EOS:
            found.append([])
        else:
            found[-1].append(i)
    return found
