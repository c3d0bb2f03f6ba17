"""The tables of `distlm reproduce awd-lstm`, from results whose numbers are written here."""

import csv
from pathlib import Path

from msgspec import UNSET
from support.records.examples import example

from distlm.analysis.papers.awd_lstm import rows, write_tables
from distlm.knnlm.evaluate.records import Results, SplitResults
from distlm.knnlm.tune.records import Figures
from distlm.runtime.records import given
from distlm.training.records import LmResults, LmSplit


def evaluated(folder: Path, valid: float, test: float) -> None:
    found = example(LmResults)
    found.splits = {
        split: LmSplit(tokens=9, loss_nats=2.0, perplexity=value) for split, value in (("valid", valid), ("test", test))
    }
    found.model.step = 600
    found.write(folder / "lm.json")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_is_finished_stands_beside_the_paper(tmp_path: Path) -> None:
    evaluated(tmp_path / "awd-lstm", 70.0, 67.25)
    evaluated(tmp_path / "no-weight-drop", 80.5, 77.0)
    results = example(Results)
    results.splits = {
        split: SplitResults(tokens=9, blocks=1, lm=Figures(4.0, value + 10), cache=Figures(4.0, value))
        for split, value in (("valid", 55.0), ("test", 53.5))
    }
    results.write(tmp_path / "awd-lstm" / "results.json")
    text = write_tables(tmp_path)
    found = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert found[2] == ["AWD-LSTM", "600", "70.00", "67.25", "0.00", "68.60", "65.80", "0.00"]
    assert found[3] == ["– weight drop", "600", "80.50", "77.00", "10.50", "78.40", "74.90", "9.80"]
    assert found[4][:5] == ["AWD-LSTM + neural cache", "", "55.00", "53.50", "-15.00"]
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as stream:
        raw = list(csv.DictReader(stream))
    assert [row["run"] for row in raw] == ["awd-lstm", "no-weight-drop", "cache"]
    assert raw[2]["valid"] == "55.0"
    base, dropped, cache = rows(tmp_path)
    assert base.ours.text() == "70.00 / 67.25" and base.finding is UNSET
    assert (dropped.ours.text(), given(dropped.paper).text()) == ("80.50 / 77.00 (+10.50)", "78.4 / 74.9 (+9.8)")
    assert (dropped.verdict, cache.verdict, cache.finding) == ("appears", "appears", "the cache lowers it")
    assert cache.ours.numbers == [55.0, 53.5, -15.0]
