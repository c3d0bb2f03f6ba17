"""Token files: flat memory-mapped word ids of each split, with a dictionary and `meta.json`, written last."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from msgspec import UnsetType

from distlm.config.schema import SPLITS as SPLITS
from distlm.data.dictionary import Dictionary
from distlm.data.records import TokenizerFacts, TokensMeta
from distlm.errors import DistlmError
from distlm.runtime.checked import Written
from distlm.runtime.files import json_hash

DTYPE = np.dtype("<i4")
"""Ids on disk: little-endian int32."""
META, DICTIONARY = "meta.json", "dict.txt"


def split_path(folder: Path, split: str) -> Path:
    """File of a split's ids."""
    return folder / f"{split}.bin"


@dataclass(frozen=True)
class TokenFiles:
    """An opened folder of token files: `{train,valid,test}.bin`, `dict.txt`, `meta.json` (the completeness marker)."""

    folder: Path
    meta: TokensMeta
    dictionary: Dictionary

    @classmethod
    def open(cls, folder: Path) -> "TokenFiles":
        """Open a finished folder.

        Raises DistlmError when it is missing or unfinished, or when a file's size or the dictionary is not what
        `meta.json` says. The ids themselves are not read.
        """
        folder = Path(folder)
        if not (folder / META).is_file():
            raise DistlmError(f"{folder}: no finished token files here (no {META}); run `distlm data prepare` first")
        meta = TokensMeta.read(folder / META)
        if meta.dtype != "int32":
            raise DistlmError(f"{folder / META}: dtype {meta.dtype!r}, expected 'int32'; run `distlm data prepare`")
        for split, facts in meta.splits.items():
            path, expected = split_path(folder, split), facts.tokens * DTYPE.itemsize
            size = path.stat().st_size if path.is_file() else None
            if size != expected:
                found = "it is missing" if size is None else f"it has {size} bytes"
                raise DistlmError(
                    f"{path}: {META} says {expected} bytes, {found}; "
                    f"delete {folder / META} and run `distlm data prepare`"
                )
        dictionary = Dictionary.load(folder / DICTIONARY)
        if dictionary.hash != meta.dictionary:
            raise DistlmError(
                f"{folder / DICTIONARY}: not the dictionary these token files were made with (hash {dictionary.hash}, "
                f"{META} says {meta.dictionary}); put the right file back or prepare again"
            )
        return cls(folder, meta, dictionary)

    def split(self, name: str) -> np.memmap:
        """Ids of a split, read-only: int32 [tokens]. Raises DistlmError naming the split when there is none."""
        self._require(name)
        return np.memmap(split_path(self.folder, name), DTYPE, "r")

    def written(self, *splits: str) -> list[Written]:
        """The files of some splits (none named: of all) as they were written, those of words among them. Raises
        DistlmError as `split`."""
        names = splits or tuple(self.meta.splits)
        for name in names:
            self._require(name)
        ids = [Written(split_path(self.folder, name), self.meta.splits[name].hash, self._mend) for name in names]
        return ids + self.written_words()

    def written_words(self) -> list[Written]:
        """The files of words alone: the dictionary, and the tokenizer of sub-words."""
        others = {} if isinstance(self.meta.others, UnsetType) else self.meta.others
        return [Written(self.folder / name, digest, self._mend) for name, digest in others.items()]

    @property
    def _mend(self) -> str:
        return f"copy it again, or delete {self.folder / META} and run `distlm data prepare`"

    def _require(self, name: str) -> None:
        if name not in self.meta.splits:
            raise DistlmError(f"{self.folder}: no split {name!r}; it has {', '.join(self.meta.splits)}")

    def words(self, name: str) -> int:
        """Words of a split, line ends counted: its tokens, unless these are sub-words. Perplexity is per word."""
        facts = self.meta.splits[name]
        return facts.words or facts.tokens

    def tokens_per_word(self, name: str) -> float:
        """1 unless the tokens are sub-words."""
        return self.meta.splits[name].tokens / self.words(name)

    @property
    def tokenizer(self) -> TokenizerFacts | None:
        """The tokenizer when the tokens are sub-words."""
        return self.meta.tokenizer or None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the dictionary and of every split's count and content: equal for equal token files."""
        splits = {name: [facts.tokens, facts.hash] for name, facts in self.meta.splits.items()}
        return json_hash({"dictionary": self.meta.dictionary, "splits": splits})
