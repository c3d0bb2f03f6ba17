"""WordPiece: vocabulary files, training that always gives the same vocabulary, and fast exact encoding.

Text is normalised and split as BERT does: control characters removed, CJK characters and punctuation apart, lower case
without accents where asked for (Devlin et al. 2019; BertNormalizer and BertPreTokenizer of `tokenizers`).
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distlm.data.shards.records import Tokenizer
from distlm.errors import DistlmError
from distlm.installed import install
from distlm.runtime.files import atomic_path, json_hash, write_json

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY, TOKENIZER, TOKENIZER_CONFIG = "vocab.txt", "tokenizer.json", "tokenizer_config.json"
ALPHABET = 1000
"""Characters of a trained vocabulary at most; words with others become [UNK]."""
MIN_COUNT = 2
"""Pairs of pieces seen fewer times are not joined in training."""
_LONGEST_WORD = 100
# A memory of about 150 MB; longer "words" are seldom seen twice.
_KNOWN_WORDS, _KNOWN_LENGTH = 500_000, 40


@dataclass(frozen=True)
class WordPiece:
    """A vocabulary and how text is made ready for it; piece i has id i."""

    pieces: tuple[str, ...]
    lower_case: bool

    @classmethod
    def load(cls, path: Path, lower_case: bool) -> "WordPiece":
        """From a vocab.txt (one piece per line) or a folder that holds one.

        Raises DistlmError for a missing file, for bytes that are not UTF-8, for an empty or repeated piece, and for a
        vocabulary without [PAD], [UNK], [CLS], [SEP] or [MASK].
        """
        path = path / VOCABULARY if path.is_dir() else path
        try:
            text = path.read_bytes().decode("utf-8")
        except FileNotFoundError as error:
            raise DistlmError(
                f"{path}: no such vocabulary; set shards.vocabulary to a vocab.txt, or to '' to train one"
            ) from error
        except UnicodeDecodeError as error:
            raise DistlmError(f"{path}: not a vocabulary: not UTF-8 text ({error})") from error
        pieces = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        lines: dict[str, int] = {}
        for number, piece in enumerate(pieces, 1):
            if not piece or piece in lines:
                what = f"the piece {piece!r} of line {lines[piece]} again" if piece else "an empty piece"
                raise DistlmError(f"{path}, line {number}: {what}; ids would be ambiguous: use the original vocabulary")
            lines[piece] = number
        missing = [piece for piece in SPECIALS if piece not in lines]
        if missing:
            raise DistlmError(f"{path}: not a WordPiece vocabulary of BERT: no piece {', '.join(missing)}")
        return cls(tuple(pieces), lower_case)

    def save(self, folder: Path, longest: int) -> None:
        """vocab.txt, and what transformers' AutoTokenizer needs beside it; `longest`: tokens of a row.

        vocab.txt comes last: where it is, the others are.
        """
        tokenizer = self.tokenizer()
        with atomic_path(folder / TOKENIZER) as temporary:
            temporary.write_text(tokenizer.to_str(pretty=True) + "\n", "utf-8")
        names = {"pad": PAD, "unk": UNK, "cls": CLS, "sep": SEP, "mask": MASK}
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lower_case,
            "model_max_length": longest,
            **{f"{name}_token": piece for name, piece in names.items()},
        }
        write_json(folder / TOKENIZER_CONFIG, config)
        with atomic_path(folder / VOCABULARY) as temporary:
            temporary.write_bytes(("\n".join(self.pieces) + "\n").encode())

    @cached_property
    def facts(self) -> Tokenizer:
        """What readers of token ids need to know."""
        ids = {name: self.pieces.index(piece) for name, piece in zip(Tokenizer.NAMES, SPECIALS, strict=True)}
        return Tokenizer(len(self.pieces), self.hash, self.lower_case, **ids)

    @cached_property
    def hash(self) -> str:
        """Identifies the vocabulary with its order and the treatment of case."""
        return json_hash({"kind": "wordpiece", "pieces": self.pieces, "lower_case": self.lower_case})

    def tokenizer(self) -> Any:
        """A tokenizer of the `tokenizers` library that knows the special tokens, for users of the model."""
        library = _tokenizers()
        tokenizer = self.bare_tokenizer()
        tokenizer.add_special_tokens([*SPECIALS])
        ends = [(SEP, self.facts.sep), (CLS, self.facts.cls)]
        tokenizer.post_processor = library.processors.BertProcessing(*ends)
        tokenizer.decoder = library.decoders.WordPiece(prefix="##")
        return tokenizer

    def bare_tokenizer(self) -> Any:
        """The same without special tokens: a text that says "[SEP]" gets pieces for it and never the token."""
        library = _tokenizers()
        ids = {piece: number for number, piece in enumerate(self.pieces)}
        model = library.models.WordPiece(ids, unk_token=UNK, max_input_chars_per_word=_LONGEST_WORD)
        return _with_bert_rules(library.Tokenizer(model), self.lower_case)


class Encoder:
    """Text → ids, exactly as `tokenizers` gives them, about six times faster on running text.

    Nothing crosses a space in BERT's rules, so what stands between two spaces always has the same pieces: it is asked
    for once and remembered.
    """

    def __init__(self, wordpiece: WordPiece) -> None:
        self._tokenizer = wordpiece.bare_tokenizer()
        self._known: dict[str, bytes] = {}

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a text without special tokens, read-only: int32 [tokens]."""
        words = text.replace("\n", " ").split(" ")
        known = self._known
        missing = list(set(words).difference(known))
        if not missing:
            return np.frombuffer(b"".join(map(known.__getitem__, words)), np.int32)
        found = self._tokenizer.encode_batch_fast(missing, add_special_tokens=False)
        new = {word: np.array(ids.ids, np.int32).tobytes() for word, ids in zip(missing, found, strict=True)}
        if len(known) < _KNOWN_WORDS:
            known.update((word, ids) for word, ids in new.items() if len(word) <= _KNOWN_LENGTH)
        return np.frombuffer(b"".join([new[word] if word in new else known[word] for word in words]), np.int32)


def train_wordpiece(texts: Callable[[], Iterator[str]], size: int, lower_case: bool) -> WordPiece:
    """A vocabulary of at most `size` pieces, the same one in every run; `texts` is read twice.

    Raises DistlmError when `size` does not even hold the special tokens and the characters.
    """
    library = _tokenizers()
    tokenizer = _with_bert_rules(library.Tokenizer(library.models.WordPiece(unk_token=UNK)), lower_case)
    seen: Counter[str] = Counter()
    for text in texts():
        seen.update(text)
    counts: Counter[str] = Counter()
    for character, count in seen.items():
        counts.update({made: count for made in tokenizer.normalizer.normalize_str(character) if not made.isspace()})
    alphabet = sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET]
    # Left to itself the library numbers the pieces ##a, ##b, … in the order of a hash map with a random seed, and ties
    # between pairs are decided by these numbers: each run gave another vocabulary.
    inner = [character for character in alphabet if len(tokenizer.pre_tokenizer.pre_tokenize_str("a" + character)) == 1]
    given = [*SPECIALS, *alphabet, *("##" + character for character in inner)]
    if size < len(given):
        raise DistlmError(
            f"shards.vocabulary_size={size}: the special tokens and the characters of train alone are {len(given)} "
            "pieces; give more"
        )
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=MIN_COUNT, special_tokens=given, initial_alphabet=alphabet,
        limit_alphabet=len(alphabet), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts(), trainer)
    ids = tokenizer.get_vocab(with_added_tokens=False)
    return WordPiece(tuple(sorted(ids, key=ids.__getitem__)), lower_case)


def _with_bert_rules(tokenizer: Any, lower_case: bool) -> Any:
    library = _tokenizers()
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lower_case
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _tokenizers() -> Any:
    # Its own threads would be one per core for each rank. It reads these when it first encodes.
    os.environ.setdefault("RAYON_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if os.environ["RAYON_NUM_THREADS"] != "1" else "false")
    try:
        import tokenizers
    except ImportError as error:
        raise DistlmError(f"shards need the tokenizers library: {install('plm')} ({error})") from error
    return tokenizers
