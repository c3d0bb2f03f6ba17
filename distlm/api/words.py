"""Ids and the words, sub-words or word pieces that they stand for."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from distlm.data.dictionary import Dictionary
from distlm.data.shards.records import Tokenizer
from distlm.data.text.shown import Shown
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError

Ids = npt.NDArray[np.int32]


class Words(ABC):
    """What the ids of a run stand for: `words[17]` → word, `words.id_of("the")`, `len(words)`, encode, decode."""

    names: Sequence[str]
    """Each id as its dictionary has it: of sub-words the tokenizer's own name of a piece."""
    numbers: dict[str, int]
    """Name → id."""
    unknown: int
    """Id of every word that there is none for."""

    def __len__(self) -> int:
        """V."""
        return len(self.names)

    @overload
    def __getitem__(self, ids: int) -> str: ...

    @overload
    def __getitem__(self, ids: Iterable[int]) -> list[str]: ...

    def __getitem__(self, ids: int | Iterable[int]) -> str | list[str]:
        """The word of an id, or those of several; a sub-word as it is written, after · where no blank is before it.

        Raises IndexError for an id outside 0..V−1."""
        if isinstance(ids, Iterable):
            return [self[int(i)] for i in ids]
        if not 0 <= ids < len(self.names):
            raise IndexError(f"id {ids}: ids are 0 to {len(self.names) - 1}")
        return self._shown_word(int(ids))

    def _shown_word(self, i: int) -> str:
        return self.names[i]

    def __contains__(self, word: str) -> bool:
        """Whether one of `names` is this."""
        return word in self.numbers

    def id_of(self, word: str) -> int:
        """Id of one of `names`; that of the unknown word where there is none."""
        return self.numbers.get(word, self.unknown)

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """A text as ids, int32 [T]; each newline is a </s>, and the text's end is none."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Ids [T] as text, each </s> as a newline."""


class TokenWords(Words):
    """Of token files: words between white space or pieces of a tokenizer, as `distlm data prepare` reads a text."""

    def __init__(self, tokens: TokenFiles) -> None:
        """Raises DistlmError where the tokenizer of sub-words cannot be read."""
        dictionary = tokens.dictionary
        self.names, self.numbers, self.unknown = dictionary.words, dictionary.ids, Dictionary.UNK
        self._shown = Shown.of(tokens)

    def encode(self, text: str) -> Ids:
        return np.array(self._shown.encode(text), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._shown.text([int(i) for i in ids])

    def _shown_word(self, i: int) -> str:
        return self._shown.word(i)


class WordPieces(Words):
    """Pieces of a masked language model's WordPiece vocabulary; [CLS] and [SEP] are not put round a text."""

    def __init__(self, folder: Path, facts: Tokenizer) -> None:
        """Raises DistlmError when the vocabulary in `folder` is not the one that `facts` describe."""
        from distlm.data.shards.wordpiece import UNK, WordPiece

        self._wordpiece = WordPiece.load(folder, facts.lower_case)
        if self._wordpiece.hash != facts.hash:
            raise DistlmError(
                f"{folder}: not the vocabulary that the shards beside it were made with; put the right vocab.txt back"
            )
        self.names = self._wordpiece.pieces
        self.numbers = {piece: number for number, piece in enumerate(self.names)}
        self.unknown = self.numbers[UNK]

    def encode(self, text: str) -> Ids:
        from distlm.data.shards.wordpiece import Encoder

        return Encoder(self._wordpiece).encode(text).copy()

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._wordpiece.tokenizer().decode([int(i) for i in ids], skip_special_tokens=False))
