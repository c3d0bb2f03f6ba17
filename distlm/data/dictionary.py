"""The dictionary: words and their ids, in fairseq's order (specials, then by falling frequency)."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from distlm.errors import DistlmError
from distlm.runtime.files import atomic_path, bytes_hash


class _Ids(dict[str, int]):
    """Word → id, with <unk> for every other word; `__missing__` keeps the look-up in C."""

    def __missing__(self, word: str) -> int:
        return Dictionary.UNK


class Specials:
    """Ids that every dictionary has."""

    BOS, PAD, EOS, UNK = 0, 1, 2, 3


class Dictionary(Specials):
    """Words of a corpus. `words[i]` is the word of id i and `counts[i]` its count in train (0 for specials, padding).

    On disk (`dict.txt`): one line "word count" per word, specials left out, padding words `madeupword0000` kept.
    """

    SPECIALS: ClassVar[tuple[str, ...]] = ("<s>", "<pad>", "</s>", "<unk>")
    RESERVED: ClassVar[tuple[str, ...]] = ("<s>", "<pad>", "</s>")
    """Specials that no text may hold: they would be read as sentence ends or padding."""

    def __init__(self, words: Sequence[str], counts: Sequence[int]) -> None:
        """`words`, `counts`: without the specials, in id order."""
        self.words: list[str] = [*self.SPECIALS, *words]
        self.counts: list[int] = [0] * len(self.SPECIALS) + list(counts)
        self.ids: dict[str, int] = _Ids(zip(self.words, range(len(self.words)), strict=True))
        if len(self.ids) != len(self.words) or len(self.counts) != len(self.words):
            raise ValueError("a word appears twice, or words and counts differ in number")

    @classmethod
    def from_counts(
        cls, counts: Mapping[str, int], min_count: int = 1, max_words: int = 0, pad_to_multiple: int = 8
    ) -> "Dictionary":
        """Words by falling count, ties in alphabetical (code point) order as in fairseq.

        Words with fewer than `min_count` occurrences, and all but the `max_words` most frequent (0: no limit;
        specials and padding do not count), are left out. `len()` is padded to a multiple of `pad_to_multiple`.
        """
        kept = [(word, count) for word, count in counts.items() if count >= min_count and word not in cls.SPECIALS]
        kept.sort(key=lambda item: (-item[1], item[0]))
        if max_words > 0:
            kept = kept[:max_words]
        words, numbers = [word for word, _ in kept], [count for _, count in kept]
        taken, serial = set(words), 0
        while (len(words) + len(cls.SPECIALS)) % pad_to_multiple:
            padding = f"madeupword{serial:04d}"
            if padding not in taken:
                words.append(padding)
                numbers.append(0)
            serial += 1
        return cls(words, numbers)

    def __len__(self) -> int:
        """Vocabulary size V: specials, words and padding."""
        return len(self.words)

    def encode(self, word: str) -> int:
        """Id of a word; UNK when it is not in the dictionary."""
        return self.ids[word]

    @cached_property
    def hash(self) -> str:
        """xxh3-128 over the words in id order: two dictionaries with the same hash give the same ids."""
        return bytes_hash("\n".join(self.words).encode("utf-8"))

    def save(self, path: Path) -> None:
        """Write `dict.txt` atomically."""
        first = len(self.SPECIALS)
        rows = zip(self.words[first:], self.counts[first:], strict=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes("".join(f"{word} {count}\n" for word, count in rows).encode("utf-8"))

    @classmethod
    def load(cls, path: Path) -> "Dictionary":
        """Read `dict.txt`. Raises DistlmError naming the line for a missing file, a bad line or a repeated word."""
        try:
            lines = path.read_bytes().decode("utf-8").split("\n")
        except FileNotFoundError as error:
            raise DistlmError(f"{path}: no such dictionary; run `distlm data prepare` first") from error
        except UnicodeDecodeError as error:
            raise DistlmError(f"{path}: not UTF-8 text ({error})") from error
        if lines[-1] == "":
            lines.pop()
        words: list[str] = []
        counts: list[int] = []
        seen = set(cls.SPECIALS)
        for number, line in enumerate(lines, 1):
            word, _, count = line.rpartition(" ")
            if not word or not count.isdigit():
                raise DistlmError(f"{path}, line {number}: expected 'word count', found {line!r}")
            if word in seen:
                raise DistlmError(f"{path}, line {number}: {word!r} appears a second time; ids would not be unique")
            seen.add(word)
            words.append(word)
            counts.append(int(count))
        return cls(words, counts)
