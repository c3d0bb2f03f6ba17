import builtins
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.shards import letters

from distlm.data.shards.wordpiece import SPECIALS, Encoder, WordPiece, train_wordpiece
from distlm.errors import DistlmError

# Words with many equal counts: ties must not be decided by a hash map.
TEXT = " ".join(f"{a}{b}{c}, Größe {a}" for a in "abcdeé" for b in "fghij" for c in "klmno")
TRAIN = "from test_wordpiece import *; print(train_wordpiece(lambda: iter([TEXT, TEXT]), 120, True).hash)"


def test_training_gives_the_same_vocabulary_in_every_process() -> None:
    here = train_wordpiece(lambda: iter([TEXT, TEXT]), 120, True)
    assert len(here.pieces) == 120 and here.pieces[:5] == SPECIALS
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    command, environment = [sys.executable, "-c", TRAIN], {**os.environ, "PYTHONPATH": path}
    for _ in range(3):
        assert subprocess.check_output(command, env=environment, text=True).strip() == here.hash


def test_a_trained_vocabulary_has_the_characters_and_then_pieces() -> None:
    trained = train_wordpiece(lambda: iter([TEXT, TEXT, "rare Ω"]), 120, True)
    assert {"a", "##k", "o", "e", "ω", ","} <= set(trained.pieces)
    assert not {"é", "Ω", "##,", " "} & set(trained.pieces), "lower case without accents; punctuation stands alone"
    cased = train_wordpiece(lambda: iter([TEXT]), 120, False)
    assert {"é", "G"} <= set(cased.pieces) and cased.hash != trained.hash
    ids = Encoder(trained).encode(TEXT)
    assert trained.facts.unk not in ids and len(ids) < len(TEXT) / 2


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(DistlmError, match=r"shards\.vocabulary_size=20: .* alone are \d+ pieces"):
        train_wordpiece(lambda: iter([TEXT]), 20, True)


def odd_text(chance: random.Random) -> str:
    """Letters of many scripts, marks, spaces of every kind, control and private characters, emoji."""
    ranges = [(0x20, 0x7F), (0, 0x2100), (0x300, 0x370), (0xAC00, 0xB000), (0x4E00, 0x4F00), (0x1F600, 0x1F650)]
    signs = "  aé\u200d\x1c\x85\xa0\u2028\u3000\ufffd\xad\nΣİß"
    return "".join(
        chance.choice(signs) if chance.random() < 0.5 else chr(chance.randrange(*chance.choice(ranges)))
        for _ in range(chance.randrange(60))
    )


@pytest.mark.parametrize("lower_case", [True, False])
def test_remembered_words_have_the_pieces_of_the_library(lower_case: bool) -> None:
    chance = random.Random(3)
    texts = [odd_text(chance) for _ in range(3000)] + ["x" * 150 + " y", "", " ", "a  b"]
    wordpiece = WordPiece(train_wordpiece(lambda: iter([TEXT, *texts[:300]]), 2500, lower_case).pieces, lower_case)
    encoder, library = Encoder(wordpiece), wordpiece.bare_tokenizer()
    for text in texts:
        assert encoder.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids, repr(text)
    assert encoder.encode(" ".join(texts)).tolist() == encoder.encode("\n".join(texts)).tolist()


def test_a_full_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.data.shards.wordpiece._KNOWN_WORDS", 3)
    encoder, library = Encoder(letters()), letters().bare_tokenizer()
    for text in ("one two three four", "five one two", "six seven one six"):
        assert encoder.encode(text).tolist() == library.encode(text).ids


def test_text_cannot_say_special_tokens() -> None:
    wordpiece = letters()
    ids = Encoder(wordpiece).encode("a [SEP] b [MASK][PAD]")
    assert not {*wordpiece.facts.special_ids} & {*ids.tolist()}
    assert wordpiece.tokenizer().encode("a [MASK]").ids[2] == wordpiece.facts.mask


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    wordpiece = letters()
    wordpiece.save(tmp_path, 64)
    assert WordPiece.load(tmp_path, True) == WordPiece.load(tmp_path / "vocab.txt", True) == wordpiece
    text = "Hello [MASK] wörld 42."
    ids = [wordpiece.facts.cls, *wordpiece.tokenizer().encode(text, add_special_tokens=False).ids, wordpiece.facts.sep]
    for tokenizer in (
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        transformers.BertTokenizerFast.from_pretrained(tmp_path),
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")),
    ):
        assert tokenizer(text)["input_ids"] == ids and len(tokenizer) == len(wordpiece.pieces)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    special = (loaded.pad_token_id, loaded.unk_token_id, loaded.cls_token_id, loaded.sep_token_id, loaded.mask_token_id)
    assert special == wordpiece.facts.special_ids and loaded.model_max_length == 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nword\n", r"no piece \[MASK\]"),
        (b"[PAD]\nword\nother\nword\n", "line 4: the piece 'word' of line 2 again"),
        (b"[PAD]\n\nword\n", "line 2: an empty piece"),
        (b"[PAD]\n\xff\n", "not UTF-8"),
        (None, "no such vocabulary"),
    ],
)
def test_files_that_are_no_vocabulary(tmp_path: Path, text: bytes | None, words: str) -> None:
    if text is not None:
        (tmp_path / "vocab.txt").write_bytes(text)
    with pytest.raises(DistlmError, match=words) as error:
        WordPiece.load(tmp_path / "vocab.txt", True)
    assert str(tmp_path / "vocab.txt") in str(error.value)


def test_without_the_library_the_pip_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "tokenizers":
            raise ImportError("No module named 'tokenizers'")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "tokenizers", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DistlmError, match=r"pip install .*\[plm\]"):
        Encoder(letters())


def test_bytes_of_the_files_do_not_change(tmp_path: Path) -> None:
    for name in ("a", "b"):
        letters().save(tmp_path / name, 64)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.data
def test_berts_vocabulary_gives_berts_ids() -> None:
    path = Path(os.environ.get("DISTLM_TEST_DATA", "")) / "bert-vocab"
    if not path.is_dir():
        pytest.skip("no BERT vocabulary: set DISTLM_TEST_DATA to a folder that holds bert-vocab/vocab.txt")
    bert = WordPiece.load(path, True)
    assert bert.facts.special_ids == (0, 100, 101, 102, 103) and bert.facts.vocabulary == 30522
    # The ids of "hello, world! embeddings" in bert-base-uncased.
    expected = [7592, 1010, 2088, 999, 7861, 8270, 4667, 2015]
    assert np.array_equal(Encoder(bert).encode("Hello, world! Embeddings"), expected)


def test_a_stop_ends_the_training() -> None:
    def texts() -> Iterator[str]:
        yield TEXT
        raise DistlmError("stopped")

    with pytest.raises(DistlmError, match="stopped"):
        train_wordpiece(texts, 120, True)
