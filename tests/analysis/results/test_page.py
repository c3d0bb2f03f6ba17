"""docs/results.md from records, and what is refused."""

from pathlib import Path

import pytest

from distlm.analysis.results.from_csv import lines_of, percent, table_of
from distlm.analysis.results.page import numbers, page, read_results, tables
from distlm.analysis.results.records import (
    ExperimentResults,
    Figure,
    ResultColumn,
    ResultRow,
    ResultsPath,
    ResultTable,
)
from distlm.analysis.results.verdict import above, lower, together
from distlm.errors import DistlmError
from distlm.runtime.files import read_json, write_json


def record(rows: list[ResultRow], path: ResultsPath = "Speed", commands: int = 1) -> ExperimentResults:
    return ExperimentResults(
        title="A title", path=path, date="2026-01-02", machine="4 cores", commit="abc1234",
        commands=[f"distlm run demo train.seed={number}" for number in range(commands)], settings=["one seed"],
        rows=rows, notes=["A note of 7.5."],
        tables=[ResultTable("all", [ResultColumn("name"), ResultColumn("ms", ".2f")], [["a", 0.5], ["b", None]])],
    )  # fmt: skip


def test_a_section_has_one_table_with_a_command_to_each_row(tmp_path: Path) -> None:
    finding = ResultRow("ppl", Figure("{:.1f} → {:,}", [2.25, 1234]), 1, Figure("{:.2f}", [75.96]), "lower", "appears")
    record([finding, ResultRow("ms", Figure("{}", [3]), 0)], "kNN-LM", 2).write(tmp_path / "one.json")
    record([ResultRow("s", Figure("{}", [4]), 0)], "kNN-LM").write(tmp_path / "two.json")
    record([ResultRow("s", Figure("{:+d}", [-4]), 0)]).write(tmp_path / "three.json")
    record([]).write(tmp_path / "four.json")
    lines = page(read_results(tmp_path)).splitlines()
    assert [line for line in lines if line.startswith("## ")] == ["## kNN-LM", "## Speed"]
    assert [line for line in lines if line.startswith("| ")] == [
        "| measured | ours | paper | the paper's finding | command |",
        "| **A title**: ppl | 2.2 → 1,234 | 75.96 | **appears**: lower | b |",
        "| ms | 3 |  |  | a |",
        "| **A title**: s | 4 |  |  | c |",
        "| measured | ours | command |",
        "| **A title**: s | -4 | a |",
    ]
    assert (
        "- `results/one.json`: 2026-01-02; 4 cores; one seed; commit abc1234. A note of 7.5. "
        "**a** `distlm run demo train.seed=0` · **b** `distlm run demo train.seed=1`"
    ) in lines
    assert "- Tables alone, with `python -m distlm.results_page NAME`: `four` (A title)." in lines


def test_all_of_a_record(tmp_path: Path) -> None:
    shown = tables(record([ResultRow("what", Figure("{}", [4]), 0)]))
    assert "| a | 0.50 |\n| b |  |" in shown and "| what | 4 | a |" in shown and shown.endswith("A note of 7.5.\n")
    assert numbers(record([ResultRow("9 of", Figure("{:+.1f} %", [-4.5]), 0)])) == {9.0, 4.5, 7.5, 0.5}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ResultRow("a", Figure("{:.2f}", [1.0, 2.0]), 0), "has 1 places for 2 numbers"),
        (ResultRow("a", Figure("{:d}", [1.5]), 0), "Unknown format code"),
        (ResultRow("a", Figure("{}", [1]), 1), "row 'a' is of command 1, of 1"),
    ],
)
def test_a_row_that_cannot_be_shown_is_refused_by_file(row: ResultRow, words: str, tmp_path: Path) -> None:
    record([row]).write(tmp_path / "x.json")
    with pytest.raises(DistlmError, match=rf"x\.json: record of results: .*{words}"):
        read_results(tmp_path)


def test_what_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=r"no results/NAME\.json"):
        read_results(tmp_path)
    record([ResultRow("a", Figure("{}", [1]), 0)]).write(tmp_path / "x.json")
    tree = read_json(tmp_path / "x.json", "")
    tree["rows"][0]["finding"] = "without a verdict"
    del tree["check"]
    write_json(tmp_path / "x.json", tree)
    with pytest.raises(DistlmError, match=r"x\.json: not a valid record of results: .*verdict"):
        read_results(tmp_path)


def test_verdicts_by_one_rule() -> None:
    assert [lower(ours, 100.0) for ours in (98.0, 99.5, 100.5, 102.0)] == [
        "appears", "cannot be said", "cannot be said", "does not appear",
    ]  # fmt: skip
    assert [above(ours, 50.0, 3.0) for ours in (54.0, 51.0, 46.0)] == ["appears", "cannot be said", "does not appear"]
    assert together(["appears", "appears"]) == "appears"
    assert together(["appears", "does not appear"]) == "cannot be said"


def test_csv_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("run,n,loss\ndense,3,0.25\npkm,,\n", "utf-8")
    found = table_of(tmp_path / "t.csv", "title")
    assert found.rows == [["dense", 3, 0.25], ["pkm", None, None]]
    assert [line["n"] for line in lines_of(tmp_path / "t.csv")] == ["3", ""] and lines_of(tmp_path / "no.csv") == []
    assert percent("0.943") == 94.3
