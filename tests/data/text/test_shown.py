"""Ids as people read them: what was written comes back, and a single piece shows whether it hangs on another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from distlm.data.dictionary import Dictionary
from distlm.data.subwords import FIRST_PIECE, TOKENIZER, Subwords
from distlm.data.text.shown import Shown

LINES = ["the reader reads — “the red reader” re-reads,", "", "a naïve café — the end 🙂"] * 4
TEXT = "\n".join(LINES[:3])


def byte_level() -> Any:
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(LINES, vocab_size=290, special_tokens=["<|endoftext|>"], show_progress=False)
    return made


def metaspace() -> Any:
    """As Llama's: blanks become ▁, with one in front of a text, and bytes stand in for what has no piece."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<unk>", "<s>", "</s>", *every_byte], limit_alphabet=20, show_progress=False
    )
    made.train_from_iterator(LINES, trainer)
    tree = json.loads(made.to_str())
    # Their pieces stay: as in real ones, they are no special tokens.
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in every_byte]
    return Tokenizer.from_str(json.dumps(tree))


def word_pieces() -> Any:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    made.train_from_iterator(LINES, trainer)
    return made


def shown_by(make: Callable[[], Any], folder: Path) -> Shown:
    made = make()
    made.save(str(folder / TOKENIZER))
    subwords = Subwords.load(str(folder))
    return Shown(subwords.dictionary(np.zeros(subwords.size, np.int64)).words, subwords)


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_text_comes_back_as_written(make: Callable[[], Any], tmp_path: Path) -> None:
    shown = shown_by(make, tmp_path)
    ids = shown.encode(TEXT)
    assert shown.text(ids) == TEXT and ids.count(Dictionary.EOS) == 2 and not shown.by_word
    assert shown.line(np.array(ids)) == f"{LINES[0]} </s> </s> {LINES[2]}"
    for cut in range(1, len(ids)):
        # Cut within a character neither half is whole.
        halves = shown.line(ids[:cut]), shown.line(ids[cut:], ids[:cut])
        assert "�" in "".join(halves) or "".join(halves) == shown.line(ids)


@pytest.mark.parametrize("make", [byte_level, metaspace, word_pieces])
def test_pieces_hang_on_what_stands_before_them_without_a_blank(make: Callable[[], Any], tmp_path: Path) -> None:
    shown = shown_by(make, tmp_path)
    ids = shown.encode("the reader readsred")
    alone = shown.words(ids, Dictionary.EOS)
    assert alone[0] == "the"[: len(alone[0])] and all("Ġ" not in word and "▁" not in word for word in alone)
    assert all("##" not in word for word in alone)
    assert " ".join(alone).replace(" ·", "") == "the reader readsred"
    assert sum(not word.startswith("·") for word in alone) == 3
    # In the middle of a line the first piece of a byte-level tokenizer has no blank.
    assert shown.words(ids[-1:], ids[-2]) == [shown.word(ids[-1])] and shown.word(ids[-1]).startswith("·")


def test_parts_of_a_character_are_bytes_and_blanks_are_seen(tmp_path: Path) -> None:
    shown = shown_by(byte_level, tmp_path)
    smile = shown.encode(" 🙂")
    assert shown.line(smile) == " 🙂" and len(smile) > 1
    first, *others = shown.words(smile)
    assert not first.startswith("·") and all(word.startswith("·") for word in others)
    assert "".join([first, *others]).replace("·", "") == "\\xf0\\x9f\\x99\\x82"
    blanks = shown.words(shown.encode("a   b\tc"))
    assert "".join(blanks).replace("·", "").replace("␣", " ").replace("\\t", "\t").replace(" ", "") == "ab\tc"
    assert not any(set(word) & set(" \t\n") for word in blanks)


def test_any_piece_may_be_drawn_but_the_tokenizers_special_ones(tmp_path: Path) -> None:
    shown = shown_by(metaspace, tmp_path)
    possible = shown.in_text([0] * len(shown._words))
    assert not possible[[Dictionary.BOS, Dictionary.PAD, Dictionary.UNK]].any() and possible[Dictionary.EOS]
    # Neither is the piece that ends a line, which </s> stands for.
    end = shown._words.index("<0x0A>")
    assert np.flatnonzero(~possible[FIRST_PIECE:]).tolist() == [0, 1, 2, end - FIRST_PIECE]


def test_words_are_shown_as_they_are() -> None:
    shown = Shown([*Dictionary.SPECIALS, "the", "·", "cat"])
    ids = [4, 5, 2, 2, 6]
    assert shown.by_word and shown.line(ids) == "the · </s> </s> cat" == " ".join(shown.words(ids))
    assert shown.text(ids) == "the ·\n\ncat" and shown.encode("the · \n\ncat dog") == [4, 5, 2, 2, 6, 3]
    assert shown.in_text([0, 0, 0, 0, 3, 0, 1]).tolist() == [False, False, True, True, True, False, True]
