"""Rows of tokens for tasks, against the tokenizers library's own."""

from pathlib import Path

import numpy as np
import pytest
from support.finetune import vocabulary

from distlm.errors import DistlmError
from distlm.finetune.tasks.features import Frame, encode_examples, shorten
from distlm.finetune.tasks.glue import Examples

PAIRS = [
    ("good1 bad2 word3", "word4"),
    ("word1", "word2 word3 word4 word5 word6"),
    ("", "word1"),
    ("a1 a1 a1 a1", "b2 b2 b2 b2"),
]


def shorten_one_by_one(first: int, second: int, room: int) -> tuple[int, int]:
    while first + second > room:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


def test_pairs_are_cut_as_bert_cuts_them() -> None:
    for first in range(12):
        for second in range(12):
            for room in range(1, 16):
                assert shorten(first, second, room) == shorten_one_by_one(first, second, room)


def test_rows_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = vocabulary(tmp_path).tokenizer()
    frame = Frame.of(tokenizer, 0)
    examples = Examples([one for one, _ in PAIRS], [two for _, two in PAIRS], np.zeros(4, np.int64))
    rows = encode_examples(tokenizer, frame, examples, 64)
    singles = encode_examples(tokenizer, frame, Examples(examples.first, None, examples.labels), 64)
    length = rows.padded_length(np.arange(4))
    assert length == 16
    batch = rows.batch(np.arange(4), length)
    for number, (one, two) in enumerate(PAIRS):
        wanted = tokenizer.encode(one, two)
        size = len(wanted.ids)
        assert batch.tokens[number].tolist() == wanted.ids + [0] * (length - size)
        assert batch.types[number].tolist() == wanted.type_ids + [0] * (length - size)
        assert batch.text[number].tolist() == [True] * size + [False] * (length - size)
        assert batch.counted[number, :size].tolist() == [not special for special in wanted.special_tokens_mask]
        assert singles.ids[singles.bounds[number] : singles.bounds[number + 1]].tolist() == tokenizer.encode(one).ids
    assert not batch.counted[~batch.text].any()


def test_long_rows_are_cut_to_the_length(tmp_path: Path) -> None:
    tokenizer = vocabulary(tmp_path).tokenizer()
    frame = Frame.of(tokenizer, 0)
    text = " ".join(f"word{i}" for i in range(30))
    pairs = encode_examples(tokenizer, frame, Examples([text], ["word1 word2"], np.zeros(1, np.int64)), 16)
    singles = encode_examples(tokenizer, frame, Examples([text], None, np.zeros(1, np.int64)), 16)
    assert pairs.lengths.tolist() == singles.lengths.tolist() == [16]
    # [CLS], 11 tokens, [SEP], two tokens, [SEP]
    assert pairs.second.tolist() == [13] and pairs.special.sum() == 3


def test_a_roberta_frame_has_four_special_tokens_and_one_type(tmp_path: Path) -> None:
    from tokenizers import processors

    wordpiece = vocabulary(tmp_path)
    tokenizer = wordpiece.bare_tokenizer()
    tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    frame = Frame.of(tokenizer, 0)
    assert frame.extra(pair=True) == 4 and frame.extra(pair=False) == 2 and frame.second_type == 0
    rows = encode_examples(tokenizer, frame, Examples(["word1"], ["word2"], np.zeros(1, np.int64)), 16)
    assert rows.ids.tolist() == tokenizer.encode("word1", "word2").ids


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=r"finetune\.tokenizer: the tokenizer puts no special tokens round a text"):
        Frame.of(vocabulary(tmp_path).bare_tokenizer(), 0)


def test_fingerprints_tell_rows_and_labels_apart(tmp_path: Path) -> None:
    tokenizer = vocabulary(tmp_path).tokenizer()
    frame = Frame.of(tokenizer, 0)

    def of(texts: list[str], labels: list[int]) -> str:
        return encode_examples(tokenizer, frame, Examples(texts, None, np.array(labels)), 16).fingerprint

    found = {of(["word1", "word2"], [0, 1]), of(["word2", "word1"], [0, 1]), of(["word1", "word2"], [1, 1])}
    assert len(found) == 3 and of(["word1", "word2"], [0, 1]) in found
