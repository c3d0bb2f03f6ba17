"""Rows of token ids for a task: [CLS] sentence [SEP], [CLS] pair [SEP] pair [SEP], or windows of a paragraph."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from distlm.errors import DistlmError
from distlm.finetune.tasks.glue import Examples
from distlm.finetune.tasks.squad import Squad

Ids = npt.NDArray[np.int32]
LONGEST_QUESTION = 64
"""Tokens of a question that are kept (BERT)."""
_PAD_TO = 8


class Batch(NamedTuple):
    """Some rows, padded to the same length T."""

    tokens: npt.NDArray[np.int64]
    """[B, T]"""
    types: npt.NDArray[np.int64]
    """[B, T] 1 in the second part of a pair, for models that tell the parts apart."""
    text: npt.NDArray[np.bool_]
    """[B, T] no padding."""
    counted: npt.NDArray[np.bool_]
    """[B, T] neither padding nor a special token."""


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts round one text or two."""

    single: tuple[Ids, Ids]
    """Before and after a text that stands alone."""
    pair: tuple[Ids, Ids, Ids]
    """Before, between and after two texts."""
    second_type: int
    """Token type of the second text."""
    pad: int

    @staticmethod
    def of(tokenizer: Any, pad: int) -> "Frame":
        """Of a tokenizer of the `tokenizers` library. Raises DistlmError when it has no special tokens of its own."""
        length = len(tokenizer.encode("a", add_special_tokens=False).ids)
        alone, both = tokenizer.encode("a"), tokenizer.encode("a", "a")
        # sequence_ids would tell the parts apart, and are not always right.
        one, two = (
            [i for i, special in enumerate(encoding.special_tokens_mask) if not special] for encoding in (alone, both)
        )
        if len(alone.ids) == length or len(both.ids) == 2 * length or len(two) != 2 * length:
            raise DistlmError(
                "finetune.tokenizer: the tokenizer puts no special tokens round a text; the head reads the first token "
                "of a row, so give the folder of the tokenizer that the model was pretrained with"
            )
        single, ids = np.array(alone.ids, np.int32), np.array(both.ids, np.int32)
        first, second = two[0], two[length]
        return Frame(
            (single[: one[0]], single[one[0] + length :]),
            (ids[:first], ids[first + length : second], ids[second + length :]),
            int(both.type_ids[second]),
            pad,
        )

    def extra(self, pair: bool) -> int:
        """Number of special tokens of a row."""
        return sum(map(len, self.pair if pair else self.single))


@dataclass(frozen=True)
class Rows:
    """Rows of various lengths."""

    ids: Ids
    """Tokens of all rows, one after another."""
    special: npt.NDArray[np.bool_]
    """Which of them are special."""
    bounds: npt.NDArray[np.int64]
    """[n + 1] row i is ids[bounds[i]:bounds[i + 1]]."""
    second: npt.NDArray[np.int32]
    """[n] where in its row the second part begins; the row's length when there is none."""
    labels: npt.NDArray[np.generic]
    """[n] label, or [n, 2] first and last token of the answer (0, 0: not in this row)."""
    frame: Frame

    def __len__(self) -> int:
        return len(self.second)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[n] tokens of each row."""
        return np.diff(self.bounds)

    @property
    def fingerprint(self) -> str:
        """Identifies tokens and labels."""
        digest = xxhash.xxh3_128()
        for array in (self.ids, self.bounds, self.second, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def padded_length(self, numbers: npt.NDArray[np.integer]) -> int:
        """The longest of some rows, rounded up to a multiple of 8."""
        return -(-int(self.lengths[numbers].max()) // _PAD_TO) * _PAD_TO

    def batch(self, numbers: npt.NDArray[np.integer], length: int) -> Batch:
        """Some rows, in that order, padded to `length`."""
        shape = (len(numbers), length)
        tokens, types = np.full(shape, self.frame.pad, np.int64), np.zeros(shape, np.int64)
        text, counted = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        for row, number in enumerate(numbers):
            start, end = self.bounds[number : number + 2]
            tokens[row, : end - start] = self.ids[start:end]
            types[row, self.second[number] : end - start] = self.frame.second_type
            text[row, : end - start] = True
            counted[row, : end - start] = ~self.special[start:end]
        return Batch(tokens, types, text, counted)


@dataclass(frozen=True)
class Windows:
    """Rows of questions with windows of their paragraphs."""

    rows: Rows
    question: npt.NDArray[np.int32]
    """[n] number of the row's question."""
    first_token: npt.NDArray[np.int32]
    """[n] number of the first token of the window in its paragraph."""
    offsets: list[npt.NDArray[np.int32]]
    """Per paragraph [tokens, 2]: characters of its tokens, from and to."""


def encode_examples(
    tokenizer: Any, frame: Frame, examples: Examples, length: int, truncation: str = "longest_first", what: str = ""
) -> Rows:
    """Rows of at most `length` tokens; pairs are cut by `shorten`, or (truncation = only_first, only_second) at that
    part alone.

    Raises DistlmError, naming the example of the split `what`, when no token of that part would be left.
    """
    first = _encode(tokenizer, examples.first)
    builder = _Builder(frame)
    if examples.second is None:
        room = length - frame.extra(pair=False)
        for ids in first:
            builder.add_single(ids[:room])
    else:
        room = length - frame.extra(pair=True)
        for number, (one, other) in enumerate(zip(first, _encode(tokenizer, examples.second), strict=True)):
            kept, also = shorten(len(one), len(other), room, truncation)
            part, whole, left = ("second", other, kept) if truncation == "only_first" else ("first", one, also)
            if truncation != "longest_first" and left < 1 and len(one) + len(other) > room:
                raise DistlmError(
                    f"finetune.truncation={truncation}: example {number + 1} of {what}: its {part} part alone has "
                    f"{len(whole)} tokens, finetune.length={length} has room for {room} of both; give a greater "
                    "finetune.length, or finetune.truncation=longest_first"
                )
            builder.add_pair(one[:kept], other[:also])
    return builder.rows(examples.labels)


def shorten(first: int, second: int, room: int, truncation: str = "longest_first") -> tuple[int, int]:
    """Lengths of a pair after tokens were taken off the end of the longer part, one at a time, of the second when
    they are equally long (Devlin et al. 2019), until both fit.

    truncation = only_first, only_second: off that part alone; its length is below 1 where that does not do.
    """
    if first + second <= room:
        return first, second
    if truncation != "longest_first":
        return (room - second, second) if truncation == "only_first" else (first, room - first)
    if first <= room // 2:
        return first, room - first
    if second <= room // 2:
        return room - second, second
    return room - room // 2, room // 2


def encode_squad(tokenizer: Any, frame: Frame, squad: Squad, length: int, stride: int, train: bool) -> Windows:
    """Windows of at most `length` tokens with question, each beginning `stride` tokens after the one before.

    The label is the place of the first answer in the row. For `train`, questions whose answer is not where the file
    says (or has no token) are left out.
    """
    texts = sorted({question.text for question in squad.questions})
    questions = dict(zip(texts, _encode(tokenizer, texts), strict=True))
    contexts = [encoding for part in _parts(squad.contexts) for encoding in _encode_batch(tokenizer, part)]
    ids = [np.array(encoding.ids, np.int32) for encoding in contexts]
    offsets = [np.array(encoding.offsets, np.int32).reshape(-1, 2) for encoding in contexts]
    builder, labels = _Builder(frame), []
    numbers: list[int] = []
    starts: list[int] = []
    for number, question in enumerate(squad.questions):
        asked, tokens = questions[question.text][:LONGEST_QUESTION], ids[question.context]
        first, last = _answer(offsets[question.context], question.start, question.end)
        if train and last < first:
            continue
        room = length - frame.extra(pair=True) - len(asked)
        if room < 1:
            raise DistlmError(f"finetune.length={length}: no room beside question {question.id}; give at least 128")
        for start in window_starts(len(tokens), room, stride):
            window = tokens[start : start + room]
            second = builder.add_pair(asked, window)
            inside = start <= first <= last < start + len(window)
            labels.append((second + first - start, second + last - start) if inside else (0, 0))
            numbers.append(number)
            starts.append(start)
    rows = builder.rows(np.array(labels, np.int64).reshape(-1, 2))
    return Windows(rows, np.array(numbers, np.int32), np.array(starts, np.int32), offsets)


def window_starts(tokens: int, room: int, stride: int) -> list[int]:
    """Where windows of `room` tokens begin, until one reaches the end."""
    starts = [0]
    while starts[-1] + room < tokens:
        starts.append(starts[-1] + min(stride, room))
    return starts


def _answer(offsets: npt.NDArray[np.int32], start: int, end: int) -> tuple[int, int]:
    """First and last token that touch the characters [start, end); last < first: none does."""
    if start < 0:
        return 0, -1
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    return first, int(np.searchsorted(offsets[:, 0], end, side="left")) - 1


class _Builder:
    """Puts rows together."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._pieces: list[Ids] = []
        self._special: list[npt.NDArray[np.bool_]] = []
        self._lengths: list[int] = [0]
        self._second: list[int] = []

    def add_single(self, ids: Ids) -> None:
        before, after = self.frame.single
        self._add((before, ids, after), None)

    def add_pair(self, first: Ids, second: Ids) -> int:
        """Gives the place of `second` in the row."""
        before, between, after = self.frame.pair
        place = len(before) + len(first) + len(between)
        self._add((before, first, between, second, after), place)
        return place

    def rows(self, labels: npt.NDArray[np.generic]) -> Rows:
        return Rows(
            np.concatenate([*self._pieces, np.zeros(0, np.int32)]),
            np.concatenate([*self._special, np.zeros(0, np.bool_)]),
            np.cumsum(self._lengths),
            np.array(self._second, np.int32),
            labels,
            self.frame,
        )

    def _add(self, parts: Sequence[Ids], second: int | None) -> None:
        """Parts are special and text in turn."""
        length = sum(map(len, parts))
        special = np.zeros(length, np.bool_)
        place = 0
        for number, part in enumerate(parts):
            special[place : place + len(part)] = number % 2 == 0
            place += len(part)
        self._pieces.extend(parts)
        self._special.append(special)
        self._lengths.append(length)
        self._second.append(length if second is None else second)


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    return [np.array(e.ids, np.int32) for part in _parts(texts) for e in _encode_batch(tokenizer, part)]


def _encode_batch(tokenizer: Any, texts: Sequence[str]) -> Any:
    return tokenizer.encode_batch(list(texts), add_special_tokens=False)


def _parts(texts: Sequence[str], size: int = 4096) -> list[Sequence[str]]:
    # The library's encodings take a hundred times the memory of the ids.
    return [texts[i : i + size] for i in range(0, len(texts), size)]
