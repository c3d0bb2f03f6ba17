"""Ids and the words, sub-words or word pieces that they stand for."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from distlm.config.schema import DataConfig
from distlm.data.dictionary import Dictionary
from distlm.data.shards.records import Tokenizer
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError

Ids = npt.NDArray[np.int32]


class Words(ABC):
    """What the ids of a run stand for: `words[17]`, `words.id_of("the")`, `len(words)`, encode, decode."""

    names: Sequence[str]
    """Name of each id as its dictionary has it."""
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
        """The word of an id, or those of several. Raises IndexError for an id outside 0..V−1."""
        if isinstance(ids, Iterable):
            return [self[int(i)] for i in ids]
        if not 0 <= ids < len(self.names):
            raise IndexError(f"id {ids}: ids are 0 to {len(self.names) - 1}")
        return self.names[ids]

    def __contains__(self, word: str) -> bool:
        """Whether a word has an id of its own."""
        return word in self.numbers

    def id_of(self, word: str) -> int:
        """Id of a word; that of the unknown word where it has none."""
        return self.numbers.get(word, self.unknown)

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """A text as ids, int32 [T]; where tokens are lines' words, each newline is a </s>."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Ids [T] as text, each </s> as a newline."""


class WholeWords(Words):
    """Words between white space, as `distlm data prepare` reads them."""

    def __init__(self, tokens: TokenFiles) -> None:
        dictionary = tokens.dictionary
        self.names, self.numbers, self.unknown = dictionary.words, dictionary.ids, Dictionary.UNK
        self._dictionary = dictionary

    def encode(self, text: str) -> Ids:
        from distlm.data.prepare import encode_lines

        return _in_lines(ids for ids, _ in encode_lines(text.split("\n"), self._dictionary))

    def decode(self, ids: Iterable[int]) -> str:
        return "\n".join(" ".join(self[line]) for line in _lines(ids))


class SubWords(Words):
    """Pieces of a Hugging Face tokenizer; the text's newline is </s>, whatever piece ends a line."""

    def __init__(self, tokens: TokenFiles, data: DataConfig) -> None:
        """Raises DistlmError when data.tokenizer is not the tokenizer that the token files were made with."""
        from distlm.data.subwords import Subwords

        facts = tokens.tokenizer
        assert facts is not None
        dictionary = tokens.dictionary
        self.names, self.numbers, self.unknown = dictionary.words, dictionary.ids, Dictionary.UNK
        self._subwords = Subwords.load(data.tokenizer, data.line_end)
        if self._subwords.hash != facts.hash:
            raise DistlmError(
                f"data.tokenizer={data.tokenizer}: not the tokenizer of {tokens.folder} (it is {self._subwords.hash}, "
                f"they were made with {facts.hash}); put the right one back, or name it: open_run(RUN, "
                "'data.tokenizer=FOLDER')"
            )

    def encode(self, text: str) -> Ids:
        return _in_lines(encoded.ids for encoded in self._subwords.encode(text.split("\n")))

    def decode(self, ids: Iterable[int]) -> str:
        from distlm.data.subwords import FIRST_PIECE

        tokenizer, lines = self._subwords.tokenizer, _lines(ids)
        pieces = [[i - FIRST_PIECE for i in line if i >= FIRST_PIECE] for line in lines]
        return "\n".join(tokenizer.decode(line, skip_special_tokens=False) for line in pieces)


class WordPieces(Words):
    """Pieces of a masked language model's WordPiece vocabulary; [CLS] and [SEP] are not put round a text."""

    def __init__(self, folder: Path, facts: Tokenizer) -> None:
        """Raises DistlmError when the vocabulary in `folder` is not the one that `facts` are of."""
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


def _in_lines(encoded: Iterable[Ids]) -> Ids:
    """Lines that each end with </s>, without that of the last one, which no newline has ended."""
    return np.concatenate([*encoded])[:-1].astype(np.int32)


def _lines(ids: Iterable[int]) -> list[list[int]]:
    lines: list[list[int]] = [[]]
    for i in ids:
        if i == Dictionary.EOS:
            lines.append([])
        else:
            lines[-1].append(int(i))
    return lines
