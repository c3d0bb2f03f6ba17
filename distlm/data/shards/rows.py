"""Packing: documents of token ids to rows of one length, [CLS] tokens [SEP]."""

import numpy as np
import numpy.typing as npt

from distlm.data.shards.records import Tokenizer

Ids = npt.NDArray[np.int32]


class RowPacker:
    """Rows of `row_tokens` = S tokens. Every row begins with [CLS] and ends with [SEP], then padding if any.

    `cross`: rows take S − 2 tokens after another from the documents, a [SEP] between two of them. A [SEP] between
    documents that would begin a row is left out, since the row before has one; so is one that would come before the
    last token of a row, which then has one token of padding. Otherwise only the last row of a shard is padded.
    Not `cross`: a document begins a row; its last row is padded.
    No token is left out or repeated. Documents without tokens give nothing.
    """

    def __init__(self, row_tokens: int, tokenizer: Tokenizer, cross: bool, dtype: npt.DTypeLike) -> None:
        self._length, self._tokenizer, self._cross, self._dtype = row_tokens, tokenizer, cross, np.dtype(dtype)
        self._held: list[Ids] = []
        self._size = 0
        self._begun = False
        self.tokens = self.documents = 0
        """Tokens of text and documents so far."""

    def add(self, ids: Ids, ends: bool) -> None:
        """The next tokens of a document, int32 [n], and whether it ends with them."""
        if len(ids):
            self._held.append(ids)
            self._size += len(ids)
            self.tokens += len(ids)
            self._begun = True
        if ends and self._begun:
            self._held.append(np.array([self._tokenizer.sep], np.int32))
            self._size += 1
            self.documents += 1
            self._begun = False

    @property
    def ready(self) -> int:
        """About how many rows `rows` would give."""
        return self._size // (self._length - 2)

    def rows(self, last: bool = False) -> npt.NDArray[np.integer]:
        """Rows that are decided by now, [n, S]; with `last`, after the end of the last document, all of them."""
        body, sep = self._length - 2, self._tokenizer.sep
        # Text never gives the id of [SEP], so it marks the ends of documents.
        stream = np.concatenate(self._held) if self._held else np.zeros(0, np.int32)
        ends = [*np.flatnonzero(stream == sep).tolist(), len(stream)]
        pieces: list[tuple[int, int]] = []
        start = next_end = 0
        while start < len(stream) and (last or start + body <= len(stream)):
            while ends[next_end] < start:
                next_end += 1
            if ends[next_end] == start and start < len(stream):
                start += 1
                continue
            stop = min(start + body, len(stream))
            if not self._cross:
                stop = min(stop, ends[next_end])
            piece_end = stop - 1 if stream[stop - 1] == sep else stop
            pieces.append((start, piece_end))
            start = stop
        self._held, self._size = [stream[start:]], len(stream) - start
        rows = np.full((len(pieces), self._length), self._tokenizer.pad, self._dtype)
        rows[:, 0] = self._tokenizer.cls
        for row, (begin, end) in zip(rows, pieces, strict=True):
            row[1 : 1 + end - begin] = stream[begin:end]
            row[1 + end - begin] = sep
        return rows
