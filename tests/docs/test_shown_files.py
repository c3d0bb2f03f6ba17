"""A table and a file that pages show, against the code: the corpora, and a DeepSpeed file of one's own."""

import json
import re
from pathlib import Path

import pytest

from distlm.data.editions import EDITIONS, Edition
from distlm.training.dsconfig import load_ds_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("edition", EDITIONS, ids=lambda edition: edition.name)
def test_the_corpora_have_the_counts_that_they_are_recognised_by(edition: Edition) -> None:
    text = (ROOT / "docs/text.md").read_text("utf-8")
    row = re.search(rf"^\| {edition.name}, .*$", text, re.MULTILINE)
    assert row is not None
    cells = [cell.strip() for cell in row[0].strip("|").split("|")]
    assert cells[3] == ", ".join(f"{count:,}" for count in edition.tokens)
    assert cells[4] == f"{edition.types:,}"


def test_a_shown_deepspeed_file_is_taken(tmp_path: Path) -> None:
    shown = re.findall(r"```json\n(.*?)```", (ROOT / "docs/knnlm.md").read_text("utf-8"), re.DOTALL)
    assert len(shown) == 1
    path = tmp_path / "my-zero2.json"
    path.write_text(shown[0], "utf-8")
    assert load_ds_config(str(path))["zero_optimization"] == json.loads(shown[0])["zero_optimization"]
