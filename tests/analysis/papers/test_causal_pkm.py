"""The table of `distlm reproduce causal-pkm`, from results whose numbers are written here."""

import csv
from pathlib import Path

import pytest
from msgspec import convert
from support.records.examples import example

from distlm.analysis.papers.causal_pkm import rows, write_tables
from distlm.analysis.tables import NothingFinished
from distlm.knnlm.evaluate.records import Results
from distlm.memory.records import MemoryUse
from distlm.training.records import LmResults, LmSplit

USE = {"mu": 0.9, "top1_mu": 0.25, "kl_u": 1.5, "kl_w": 2.25, "gini": 0.5}


def finished(root: Path, run: str, lm: float, knn: float, memory: bool, measured_on: str = "valid") -> None:
    """results.json, and of a model with memory lm.json, as far as the table reads them."""
    found = example(Results)
    split = next(iter(found.splits.values()))
    split.lm.perplexity = lm
    assert split.knn
    split.knn.perplexity = knn
    found.splits = {measured_on: split}
    found.model.parameters, found.model.step = 5_000_000, 600
    found.write(root / run / "results.json")
    if memory:
        used = example(LmResults)
        layers = convert({"3": USE}, dict[str, MemoryUse])
        used.splits = {"valid": LmSplit(tokens=9, loss_nats=2.0, perplexity=lm, memory=layers)}
        used.write(root / run / "lm.json")


def test_a_line_for_each_model_and_its_use(tmp_path: Path) -> None:
    with pytest.raises(NothingFinished, match="no run is finished yet"):
        write_tables(tmp_path)
    finished(tmp_path, "dense", 160.0, 140.0, False)
    finished(tmp_path, "init-pkm", 120.5, 110.25, True)
    shown = write_tables(tmp_path)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line[:1] == "|"]
    assert lines[2] == ["dense", "5.00 M", "600", "160.00", "140.00", "", "", "", "", ""]
    assert lines[3] == ["Init + PKM", "5.00 M", "600", "120.50", "110.25", "3", "90.0", "25.0", "1.50", "2.25"]
    assert shown.startswith((tmp_path / "table.md").read_text("utf-8").rstrip())
    with (tmp_path / "table.csv").open(encoding="utf-8") as stream:
        raw = list(csv.DictReader(stream))
    assert [line["run"] for line in raw] == ["dense", "init-pkm"]
    assert float(raw[1]["valid_kNN"]) == 110.25 and float(raw[1]["top1_mu"]) == 0.25 and raw[0]["layer"] == ""


def test_a_run_without_valid_is_none_that_can_be_compared(tmp_path: Path) -> None:
    """knn.splits=[test] of an older version."""
    finished(tmp_path, "dense", 160.0, 140.0, False, measured_on="test")
    with pytest.raises(NothingFinished):
        write_tables(tmp_path)
    finished(tmp_path, "pkm", 150.0, 130.0, False)
    write_tables(tmp_path)
    assert rows(tmp_path) == []


def test_each_memory_beside_the_dense_model_of_as_many_updates(tmp_path: Path) -> None:
    for run, lm, knn in (
        ("dense", 160.0, 140.0),
        ("pkm", 170.0, 141.0),
        ("init", 120.0, 110.0),
        ("init-pkm", 110, 100),
    ):
        finished(tmp_path, run, lm, knn, "pkm" in run)
    write_tables(tmp_path)
    nothing, dense, use, later = rows(tmp_path)
    assert nothing.ours.text() == "170.00, 141.00 (160.00, 140.00)" and nothing.verdict == "does not appear"
    assert dense.ours.numbers == [110.0, 100.0, 120.0, 110.0] and dense.verdict == "appears"
    assert use.ours.text() == "25.0 %" and use.verdict == "appears" and later.ours.numbers == [25.0]
