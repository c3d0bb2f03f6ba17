import builtins
import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
from support import write_text
from support.present import present

from distlm.config import DataConfig
from distlm.data.corpus import Corpus, open_corpus
from distlm.data.records import TextFile
from distlm.data.text.stream import read_lines
from distlm.errors import DistlmError


def folder(path: Path) -> Corpus:
    return open_corpus(DataConfig(source="folder", text_dir=str(path)))


def test_folder_lines_are_unaltered_and_a_last_line_without_newline_counts(tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "train.txt").write_bytes(" = A = \n \n\nCafé b\u00a0c\u2028d\r\nlast".encode())
    corpus = folder(tmp_path)
    assert list(corpus.read("train")) == [" = A = ", " ", "", "Café b\u00a0c\u2028d\r", "last"]
    assert corpus.lines["train"] == 5
    assert list(corpus.read("train")) == list(corpus.read("train"))


def test_folder_description_holds_name_size_and_sha256(tmp_path: Path) -> None:
    write_text(tmp_path)
    facts = present(folder(tmp_path).description.files)["valid"]
    raw = (tmp_path / "valid.txt").read_bytes()
    assert facts == TextFile("valid.txt", len(raw), hashlib.sha256(raw).hexdigest())


def test_wikitext_file_names_are_understood(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(f"{split} line\n")
    assert list(folder(tmp_path).read("test")) == ["test line"]


def test_both_naming_styles_are_refused(tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "wiki.train.tokens").write_text("a\n")
    with pytest.raises(DistlmError, match=r"train\.txt.*wiki\.train\.tokens.*two corpora in one folder; move one"):
        folder(tmp_path)


def test_missing_folder_and_unset_field(tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=r"data\.text_dir=.*nowhere: no such folder"):
        folder(tmp_path / "nowhere")
    with pytest.raises(DistlmError, match=r"data\.text_dir is empty"):
        open_corpus(DataConfig())


@pytest.mark.parametrize("style", ["{}.txt", "wiki.{}.tokens"])
def test_missing_split_names_the_file_in_the_style_of_the_others(tmp_path: Path, style: str) -> None:
    for split in ("train", "test"):
        (tmp_path / style.format(split)).write_text("a\n")
    with pytest.raises(DistlmError, match=f"{style.format('valid')}: no such file .the valid split"):
        folder(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "test.txt").write_text("")
    with pytest.raises(DistlmError, match=r"test\.txt: empty file"):
        folder(tmp_path)


def test_bytes_that_are_not_utf8_name_file_line_and_byte(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"good\nalso good\nna\xefve bad\nmore\n")
    with pytest.raises(DistlmError, match=r"train\.txt, line 3: not UTF-8 text \(byte 0xef at column 3\).*iconv"):
        list(read_lines(tmp_path / "train.txt"))


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the real `datasets` library loads: parquet files with the splits that the hub uses."""
    datasets = pytest.importorskip("datasets", reason="the hub extra is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    where = tmp_path / "hub"
    where.mkdir()
    rows = {"train": [" = A = \n", "", "one two \n", "three"], "validation": ["v w\n"], "test": ["t\n", "u\nv"]}
    for split, lines in rows.items():
        datasets.Dataset.from_dict({"text": lines, "id": list(range(len(lines)))}).to_parquet(
            where / f"{split}.parquet"
        )
    return where


def hub(where: Path | str, **fields: Any) -> Corpus:
    return open_corpus(DataConfig(source="hub", hub_name=str(where), **fields))


def test_hub_rows_are_lines_with_or_without_their_newline(local_hub: Path) -> None:
    corpus = hub(local_hub)
    assert list(corpus.read("train")) == [" = A = ", "", "one two ", "three"]
    assert list(corpus.read("valid")) == ["v w"]
    assert list(corpus.read("test")) == ["t", "u", "v"]
    assert corpus.description.hub and corpus.description.hub.rows == {"train": 4, "valid": 1, "test": 2}


def test_hub_column_that_is_not_there_or_holds_no_text(local_hub: Path) -> None:
    with pytest.raises(DistlmError, match=r"no column data\.hub_field=lines; it has text, id"):
        hub(local_hub, hub_field="lines")
    with pytest.raises(DistlmError, match=r"train, row 1: column id holds 0, expected text"):
        hub(local_hub, hub_field="id")


def test_hub_split_that_is_not_there(local_hub: Path) -> None:
    (local_hub / "validation.parquet").unlink()
    with pytest.raises(DistlmError, match="no validation or valid split; it has train, test"):
        hub(local_hub)


def test_hub_set_that_cannot_be_loaded(local_hub: Path) -> None:
    with pytest.raises(DistlmError, match=r"data\.hub_name=.*nothing: the datasets library cannot load it"):
        hub(local_hub / "nothing")
    with pytest.raises(DistlmError, match=r"data\.hub_name is empty"):
        hub("")


def test_hub_without_the_library_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DistlmError, match=r"pip install .*\[hub\]"):
        hub("some/thing")
