"""Sub-word token files: lines of text as pieces of a Hugging Face tokenizer (a `tokenizer.json`).

Piece i has id FIRST_PIECE + i, so that the ids of <s>, <pad>, </s> and <unk> stay what they are for words. Each line
ends with one </s>, which the model reads and predicts as the piece `line_end`, its own newline where it has one. The
number of words (split at white space, and each line's end, as the papers count) is kept beside the number of tokens,
because perplexity is per word.

A special token that the text spells out ("</s>", "<|endoftext|>") is text like any other and never the token.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distlm.data.dictionary import Dictionary
from distlm.data.records import TokenizerFacts
from distlm.errors import DistlmError
from distlm.installed import install
from distlm.runtime.files import bytes_hash

FIRST_PIECE = len(Dictionary.SPECIALS)
"""Id of the tokenizer's piece 0."""
TOKENIZER = "tokenizer.json"
LINE_ENDS = ("Ċ", "<0x0A>", "\n", "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
"""Pieces that may end a line: newlines, then ends of a text."""
_LINES = 2000
"""Lines encoded at once."""


class Encoded(NamedTuple):
    """Some lines."""

    ids: npt.NDArray[np.int32]
    lines: int
    words: int


@dataclass(frozen=True)
class Subwords:
    """A tokenizer, and the dictionary of its pieces."""

    tokenizer: Any
    """Of the `tokenizers` library."""
    line_end: int
    """Piece that stands for </s>."""

    @classmethod
    def load(cls, name: str, line_end: str = "") -> "Subwords":
        """The tokenizer of a folder with a tokenizer.json, or of that name on the hub.

        `line_end`: the piece that ends a line; empty: see `of`. Raises DistlmError when the library, the
        tokenizer or the piece is missing.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise DistlmError(f"data.tokenizer needs tokenizers: {install('hf')} ({error})") from error
        folder = Path(name)
        if folder.is_dir() and not (folder / TOKENIZER).is_file():
            raise DistlmError(
                f"data.tokenizer={name}: no {TOKENIZER} in it; make one with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        try:
            found = Tokenizer.from_file(str(folder / TOKENIZER)) if folder.is_dir() else Tokenizer.from_pretrained(name)
        # The library raises plain Exception.
        except Exception as error:
            raise DistlmError(
                f"data.tokenizer={name}: no folder with a {TOKENIZER}, and no tokenizer on the hub that can be read "
                f"({error})"
            ) from error
        return cls.of(found, line_end, name)

    @classmethod
    def of(cls, tokenizer: Any, line_end: str = "", name: str = "of the model") -> "Subwords":
        """Those of a tokenizer of the `tokenizers` library, which is changed: it cuts and pads no text afterwards.

        `line_end`: the piece that ends a line; empty: the one of LINE_ENDS that the tokenizer makes of a newline in a
        text, else the first that it has. `name` is for messages. Raises DistlmError when there is none.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        there = [tokenizer.token_to_id(piece) for piece in ((line_end,) if line_end else LINE_ENDS)]
        numbers = [number for number in there if number is not None]
        if numbers:
            # Gemma has all bytes as pieces, and a newline of its own beside them.
            made = tokenizer.encode("a\na", add_special_tokens=False).ids if len(numbers) > 1 else []
            return cls(tokenizer, next((number for number in numbers if number in made), numbers[0]))
        raise DistlmError(
            f"data.line_end={line_end!r}: data.tokenizer={name} has no {'such piece' if line_end else 'newline'}; set "
            "it to the piece that ends a line, e.g. the tokenizer's end of a text"
        )

    @cached_property
    def hash(self) -> str:
        """Identifies the tokenizer and the end of a line."""
        return bytes_hash(f"{self.tokenizer.to_str()} {self.line_end}".encode())

    @cached_property
    def specials(self) -> list[str]:
        """Special tokens of the tokenizer."""
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]

    @cached_property
    def begin(self) -> int | None:
        """Piece that the tokenizer puts in front of a text; None: it puts none."""
        whole, bare = (self.tokenizer.encode("a", add_special_tokens=flag).ids for flag in (True, False))
        return whole[0] if len(whole) > len(bare) and whole[1 : 1 + len(bare)] == bare else None

    @cached_property
    def _text_tokenizer(self) -> Any:
        """The same tokenizer, but special tokens that are spelled out in a text are ordinary text."""
        from tokenizers import Tokenizer

        tree = self.tokenizer.to_str()
        found = Tokenizer.from_str(tree)
        found.encode_special_tokens = True
        # Models that look for whole words in their vocabulary find these there.
        held = [
            name
            for name in self.specials
            if found.token_to_id(name) in found.encode(name, add_special_tokens=False).ids
        ]
        if held and (other := _without(json.loads(tree), held)):
            found = Tokenizer.from_str(json.dumps(other))
            found.encode_special_tokens = True
        return found

    @cached_property
    def pieces(self) -> list[str]:
        """By number; numbers that the tokenizer leaves out are filled."""
        found = self.tokenizer.get_vocab(with_added_tokens=True)
        size = max(found.values()) + 1
        names = {number: piece for piece, number in found.items()}
        return [names.get(number, f"madeupword{number:06d}") for number in range(size)]

    @property
    def facts(self) -> TokenizerFacts:
        """For meta.json."""
        return TokenizerFacts(self.hash, len(self.pieces), self.line_end, self.pieces[self.line_end])

    @property
    def size(self) -> int:
        """V of the dictionary."""
        return FIRST_PIECE + len(self.pieces)

    def dictionary(self, counts: npt.NDArray[np.int64]) -> Dictionary:
        """The pieces as a dictionary; `counts` int64 [V] of its ids in train."""
        return Dictionary([_in_one_line(piece) for piece in self.pieces], counts[FIRST_PIECE:].tolist())

    def encode(self, lines: Iterable[str]) -> Iterator[Encoded]:
        """Each line's pieces and then EOS, without the special tokens that a tokenizer puts around a text."""
        waiting = iter(lines)
        while batch := list(islice(waiting, _LINES)):
            ids: list[int] = []
            for encoding in self._text_tokenizer.encode_batch(batch, add_special_tokens=False):
                ids += [FIRST_PIECE + number for number in encoding.ids]
                ids.append(Dictionary.EOS)
            yield Encoded(np.array(ids, np.dtype("<i4")), len(batch), sum(len(line.split()) + 1 for line in batch))

    def tokens_per_line(self, lines: Iterable[str]) -> float:
        """Of the first lines."""
        first = next(self.encode(islice(lines, _LINES)), None)
        return 1.0 if first is None else len(first.ids) / first.lines


def _without(tree: dict[str, Any], names: list[str]) -> dict[str, Any] | None:
    """A tokenizer.json with other names for some pieces, under their old ids; None: its model needs the names.

    Text has no NUL, so it never spells the new ones.
    """
    model, new = tree["model"], {name: f"\0{name}" for name in names}
    if model["type"] == "Unigram":
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
    elif model["type"] in ("WordLevel", "WordPiece"):
        model["vocab"] = {new.get(piece, piece): number for piece, number in model["vocab"].items()}
        model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
    else:
        return None
    for token in tree["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    return tree


def _in_one_line(piece: str) -> str:
    """A piece as dict.txt holds it: no newline, not empty, and never one of our special words."""
    shown = piece.replace("\\", "\\\\").replace("\n", "\\n")
    return f"\\{shown}" if shown in Dictionary.SPECIALS or not shown else shown
