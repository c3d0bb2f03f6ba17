"""Sub-word token files: ids, line ends, words, and what a tokenizer may lack."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import write_text
from support.foreign.hf import save_gpt2, save_llama
from support.knn import in_stage
from support.present import present

from distlm.config.load import load_config
from distlm.config.schema import RunConfig
from distlm.data.dictionary import Dictionary
from distlm.data.prepare import run_prepare
from distlm.data.subwords import FIRST_PIECE, Subwords
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError, UsageError


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("subwords") / "text", train_lines=160)


@pytest.fixture(scope="module")
def gpt2(text: Path) -> Path:
    return save_gpt2(text.parent / "gpt2", text)


def config_of(text: Path, run: Path, *settings: str) -> RunConfig:
    return load_config("demo", ["data.source=folder", f"data.text_dir={text}", f"run_dir={run}", *settings])


def test_ids_are_the_tokenizers_after_the_special_words(text: Path, gpt2: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    config = config_of(text, tmp_path / "run", f"data.tokenizer={gpt2}")
    in_stage("prepare", config, run_prepare)
    tokens, tokenizer = TokenFiles.open(tmp_path / "run" / "tokens"), Tokenizer.from_file(str(gpt2 / "tokenizer.json"))
    lines = (text / "valid.txt").read_text("utf-8").split("\n")[:-1]
    expected: list[int] = []
    for line in lines:
        expected += [4 + number for number in tokenizer.encode(line).ids] + [Dictionary.EOS]
    assert np.array_equal(tokens.split("valid"), expected)
    assert tokens.words("valid") == sum(len(line.split()) + 1 for line in lines)
    assert tokens.tokens_per_word("valid") == len(expected) / tokens.words("valid") > 1
    assert tokens.dictionary.words[4 + present(tokenizer.token_to_id("Ġ"))] == "Ġ" and len(tokens.dictionary) == 304
    train = np.asarray(tokens.split("train"))
    counts = np.bincount(train, minlength=304)
    assert tokens.dictionary.counts[FIRST_PIECE:] == counts[FIRST_PIECE:].tolist()
    again = Tokenizer.from_file(str(tmp_path / "run" / "tokens" / "tokenizer.json"))
    assert again.decode([number - 4 for number in expected[: expected.index(2)]]) == next(
        line for line in lines if line
    )
    assert in_stage("prepare", config, run_prepare)["already"]
    with pytest.raises(DistlmError, match=r"prepared with other settings .*tokenizer"):
        in_stage("prepare", config_of(text, tmp_path / "b", f"data.tokens_dir={tmp_path / 'run/tokens'}"), run_prepare)


def test_words_that_are_tokens_are_counted_once(text: Path, tmp_path: Path) -> None:
    in_stage("prepare", config_of(text, tmp_path / "run"), run_prepare)
    tokens = TokenFiles.open(tmp_path / "run" / "tokens")
    assert tokens.tokenizer is None and tokens.words("test") == len(tokens.split("test"))
    assert tokens.tokens_per_word("test") == 1


def test_pieces_that_look_like_ours_or_hold_newlines_stay_apart(text: Path, tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "llama", text)
    tree = json.loads((llama / "tokenizer.json").read_text("utf-8"))
    more = {"two\nlines": 40, "\\n": 41, " ": 42, "\\<s>": 43}
    tree["added_tokens"] += [
        {"id": number, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": False} for piece, number in more.items()
    ]  # fmt: skip
    (llama / "tokenizer.json").write_text(json.dumps(tree), "utf-8")
    found = Subwords.load(str(llama))
    assert found.pieces[found.line_end] == "</s>" and found.pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert set(more) <= set(found.pieces)
    dictionary = found.dictionary(np.zeros(found.size, np.int64))
    dictionary.save(tmp_path / "dict.txt")
    assert Dictionary.load(tmp_path / "dict.txt").words == dictionary.words
    assert dictionary.words[FIRST_PIECE + 1] == "\\<s>"


def test_numbers_that_a_tokenizer_leaves_out_are_filled(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"</s>": 0, "a": 2, "b": 5}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    found = Subwords.load(str(tmp_path))
    assert [found.pieces[number] for number in (0, 2, 5)] == ["</s>", "a", "b"] and found.size == 10
    assert len(found.dictionary(np.zeros(10, np.int64))) == 10


def test_the_piece_that_ends_a_line_can_be_chosen(text: Path, gpt2: Path) -> None:
    found = Subwords.load(str(gpt2), "<|endoftext|>")
    assert found.line_end == 0 and found.hash != Subwords.load(str(gpt2)).hash
    ids, lines, words = next(found.encode(["w1 w2", "", "w3"]))
    assert lines == 3 and words == 6 and (ids == Dictionary.EOS).sum() == 3
    with pytest.raises(DistlmError, match=r"data.line_end='\[END\]': .* has no such piece"):
        Subwords.load(str(gpt2), "[END]")


@pytest.mark.parametrize("own", [True, False])
def test_of_several_newlines_the_one_that_the_tokenizer_makes_of_a_text_ends_a_line(own: bool) -> None:
    """A BPE with all bytes as pieces, as Gemma's with a newline of its own beside them, and as Llama 2's without."""
    from tokenizers import Tokenizer, models

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "Ċ", *(["\n"] if own else [])]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    found = Subwords.of(tokenizer)
    assert found.pieces[found.line_end] == ("\n" if own else "<0x0A>")
    assert Subwords.of(tokenizer, "<0x0A>").line_end == vocabulary["<0x0A>"]


def special_tokenizer(folder: Path, kind: str) -> Subwords:
    """A tokenizer whose model holds its special tokens as whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = "<>/|sabn "
    if kind == "Unigram":
        # Its control pieces are in the vocabulary, and cheapest.
        vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -4.0) for letter in letters)]
        tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    else:
        words = ["<unk>", "</s>", *letters, *(f"##{letter}" for letter in letters), "ab"]
        model = models.WordLevel if kind == "WordLevel" else models.WordPiece
        tokenizer = Tokenizer(model({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return Subwords.load(str(folder))


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel", "WordPiece"])
def test_a_model_with_special_words_in_its_vocabulary_does_not_find_them(tmp_path: Path, kind: str) -> None:
    found = special_tokenizer(tmp_path / kind, kind)
    end = FIRST_PIECE + found.tokenizer.token_to_id("</s>")
    ids = next(found.encode(["ab </s> ab", "a</s>b", "ab"])).ids.tolist()
    assert end not in ids
    if kind != "WordLevel":
        assert FIRST_PIECE + found.tokenizer.token_to_id("<unk>") not in ids
    # Other text is cut as before.
    text = ["ab a b", "", "ab/", "ba q"]
    expected: list[int] = []
    for line in text:
        expected += [FIRST_PIECE + n for n in found.tokenizer.encode(line, add_special_tokens=False).ids] + [2]
    assert next(found.encode(text)).ids.tolist() == expected
    assert found.pieces[found.line_end] == "</s>"


@pytest.mark.parametrize(("kind", "special"), [("gpt2", "<|endoftext|>"), ("llama", "</s>")])
def test_a_special_token_spelled_in_the_text_stays_text(
    text: Path, gpt2: Path, tmp_path: Path, kind: str, special: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = gpt2 if kind == "gpt2" else save_llama(tmp_path / "llama", text)
    spelled = tmp_path / "text"
    spelled.mkdir()
    for split in ("train", "valid", "test"):
        (spelled / f"{split}.txt").write_text((text / f"{split}.txt").read_text("utf-8"), "utf-8")
    with (spelled / "valid.txt").open("a", encoding="utf-8") as stream:
        stream.write(f"w1 {special} w2{special}\n")
    config = config_of(spelled, tmp_path / "run", f"data.tokenizer={folder}")
    in_stage("prepare", config, run_prepare)
    assert f"note: the text spells {special!r} 2 times; that stays text" in capsys.readouterr().err
    tokens, found = TokenFiles.open(tmp_path / "run" / "tokens"), Subwords.load(str(folder))
    number = FIRST_PIECE + found.tokenizer.token_to_id(special)
    assert number not in tokens.split("valid")
    # The text without that line has the tokens that it had.
    in_stage("prepare", config_of(text, tmp_path / "b", f"data.tokenizer={folder}"), run_prepare)
    before = TokenFiles.open(tmp_path / "b" / "tokens")
    valid = before.split("valid")
    assert np.array_equal(tokens.split("valid")[: len(valid)], valid)
    assert tokens.meta.tokenizer == before.meta.tokenizer and "the text spells" not in capsys.readouterr().err


def test_what_is_no_tokenizer_is_refused(text: Path, gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DistlmError, match=r"no tokenizer.json in it; make one with transformers"):
        Subwords.load(str(tmp_path / "empty"))
    (tmp_path / "empty" / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(DistlmError, match=r"no folder with a tokenizer.json, and no tokenizer on the hub"):
        Subwords.load(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match=r"data.dictionary=.*leave one out"):
        config_of(text, tmp_path, f"data.tokenizer={gpt2}", "data.dictionary=dict.txt")
