import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import write_text
from support.records import alter, unsealed

from distlm.data.prepare import PrepareSummary
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError


@pytest.fixture
def tokens(prepare: Callable[..., PrepareSummary], tmp_path: Path) -> Path:
    """A finished folder."""
    text = write_text(tmp_path / "text")
    return Path(prepare("data.source=folder", f"data.text_dir={text}")["folder"])


def test_split_is_a_read_only_memory_map(tokens: Path) -> None:
    ids = TokenFiles.open(tokens).split("valid")
    assert isinstance(ids, np.memmap) and ids.dtype == np.dtype("<i4") and ids.ndim == 1
    with pytest.raises(ValueError):
        ids[0] = 1


def test_split_that_is_not_there(tokens: Path) -> None:
    with pytest.raises(DistlmError, match="no split 'dev'; it has train, valid, test"):
        TokenFiles.open(tokens).split("dev")


def test_cut_or_missing_file(tokens: Path) -> None:
    whole = (tokens / "train.bin").read_bytes()
    (tokens / "train.bin").write_bytes(whole[:-3])
    with pytest.raises(DistlmError, match=rf"train\.bin: meta\.json says {len(whole)} bytes, it has {len(whole) - 3}"):
        TokenFiles.open(tokens)
    (tokens / "train.bin").unlink()
    with pytest.raises(DistlmError, match="it is missing"):
        TokenFiles.open(tokens)


def test_another_dictionary(tokens: Path) -> None:
    lines = (tokens / "dict.txt").read_text().splitlines(keepends=True)
    (tokens / "dict.txt").write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(DistlmError, match="not the dictionary these token files were made with"):
        TokenFiles.open(tokens)


@pytest.mark.parametrize("text", ["[]", '{"splits": {}}', '{"spl'])
def test_meta_that_is_not_ours(tokens: Path, text: str) -> None:
    (tokens / "meta.json").write_text(text)
    with pytest.raises(DistlmError, match=r"meta\.json: not"):
        TokenFiles.open(tokens)


def test_meta_with_another_type(tokens: Path) -> None:
    alter(tokens / "meta.json", dtype="int16")
    with pytest.raises(DistlmError, match="dtype 'int16', expected 'int32'"):
        TokenFiles.open(tokens)


def test_fingerprint_follows_content_and_not_place(tokens: Path, tmp_path: Path) -> None:
    before = TokenFiles.open(tokens).fingerprint
    moved = tokens.rename(tmp_path / "elsewhere")
    assert TokenFiles.open(moved).fingerprint == before
    meta = unsealed(moved / "meta.json")
    meta["splits"]["test"]["hash"] = "0" * 32
    (moved / "meta.json").write_text(json.dumps(meta))
    assert TokenFiles.open(moved).fingerprint != before
