"""Words that have a meaning of their own are refused in a text, with their place in its file."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.foreign.text import write_packed, write_rows

from distlm.data.prepare import PrepareSummary
from distlm.errors import DistlmError

Prepare = Callable[..., PrepareSummary]
SPLITS = ("train", "valid", "test")


@pytest.mark.parametrize("split", SPLITS)
def test_reserved_word_in_the_text_names_file_line_and_word(
    prepare: Prepare, folder: list[str], text: Path, tmp_path: Path, split: str
) -> None:
    (text / f"{split}.txt").write_text("w1 w2\nw1 </s>\n")
    with pytest.raises(DistlmError, match=rf"{split}\.txt, line 2: the text holds '</s>'"):
        prepare(*folder)
    (text / f"{split}.txt").write_text("w1\n\n<pad>\n")
    with pytest.raises(DistlmError, match=rf"{split}\.txt, line 3: the text holds '<pad>'"):
        prepare(*folder)
    assert not (tmp_path / "run/tokens/meta.json").exists()


@pytest.mark.parametrize(
    ("name", "rows", "place"),
    [
        ("train/b.txt", ["a b\nc", "d </s>\ne"], r"train/b\.txt, line 3"),
        ("train/b.txt.gz", ["</s>"], r"train/b\.txt\.gz, line 1"),
        ("train.jsonl", ["a b\nc d\ne f", "x </s> y"], r"train\.jsonl, line 2"),
        ("train.csv", ["a b", "c\nd", "x </s> y"], r"train\.csv, line 5"),
    ],
)
@pytest.mark.parametrize("share", [0, 0.4])
def test_a_reserved_words_place_is_that_in_its_file(
    prepare: Prepare, text: Path, name: str, rows: list[str], place: str, share: float
) -> None:
    """Also where train has other files before it, rows of several lines, or gives documents to valid."""
    (text / "train.txt").unlink()
    if ".txt" in name:
        write_packed(text / "train/a.txt", b"a b\nc\n\n" * 20)
        write_packed(text / name, "\n".join([*rows, ""]).encode())
    else:
        write_rows(text / name, [*rows, *["a b"] * 20])
    if share:
        (text / "valid.txt").unlink()
    with pytest.raises(DistlmError, match=rf"{place}: the text holds '</s>'"):
        prepare("data.source=folder", f"data.text_dir={text}", f"data.valid_share={share}")
