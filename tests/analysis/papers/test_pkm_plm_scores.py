"""Whether a memory raises the scores of `distlm reproduce pkm-plm` and frozen values lower them, from results whose
numbers are written here."""

from pathlib import Path

import pytest
from support.pkm_plm import evaluated, finetuned, lines_of

from distlm.analysis.papers.pkm_plm import rows, write_tables
from distlm.analysis.results.records import ResultRow
from distlm.runtime.records import given


def found_rows(root: Path) -> list[ResultRow]:
    write_tables(root)
    return rows(root)


@pytest.mark.parametrize(
    ("runs", "task", "words", "ours", "paper"),
    [
        # With as many updates: model (b) of table 4; else model (a).
        ({"dense": 0.80, "init": 0.85}, "SST-2", "dense, as long again", "92.0 (85.0; 50.9); +7.0 ± ", "94.0 (92.4)"),
        ({"dense": 0.80}, "SST-2", "dense", "92.0 (80.0; 50.9); +12.0 ± ", "94.0 (92.8)"),
        ({"dense": 0.80, "init": 0.85}, "CoLA", "dense, as long again", "92.0 (85.0; 0.0); +7.0 ± ", "64.1 (61.4)"),
        ({"dense": 0.80}, "CoLA", "dense", "92.0 (80.0; 0.0); +12.0 ± ", "64.1 (60.8)"),
        ({"dense": 0.80, "init": 0.85}, "QNLI", "dense, as long again", "92.0 (85.0; 50.5); +7.0 ± ", "90.4 (89.2)"),
        ({"dense": 0.80}, "SQuAD", "dense", "92.0 (80.0; 1.0); +12.0 ± ", "90.8 (89.8)"),
        ({"dense": 0.80}, "RTE", "dense", "92.0 (80.0; 52.7); +12.0 ± ", ""),
    ],
)
def test_a_memory_is_compared_with_the_dense_model_that_the_paper_s_figure_is_of(
    runs: dict[str, float], task: str, words: str, ours: str, paper: str, tmp_path: Path
) -> None:
    for run, value in runs.items():
        finetuned(tmp_path, run, task, [value])
    finetuned(tmp_path, "init-resm", task, [0.92], "updated")
    (row,) = found_rows(tmp_path)
    assert row.what == f"{task} on dev, +Init +ResM, values updated (and {words}; best single answer)"
    assert row.ours.text().startswith(ours) and row.finding == "a memory raises the score"
    assert (given(row.paper).text() if row.paper else "") == paper


@pytest.mark.parametrize(
    ("task", "size", "updated", "frozen", "told", "verdict"),
    [
        # Of each score √(p (1 − p) / rows); of Matthews' coefficients 1 / √rows.
        ("CoLA", 1043, 0.164, 0.128, "12.8 (16.4); updated +3.6 ± 4.4 by the rows", "cannot be said"),
        ("CoLA", 1043, 0.284, 0.128, "12.8 (28.4); updated +15.6 ± 4.4 by the rows", "appears"),
        ("SST-2", 872, 0.860, 0.825, "82.5 (86.0); updated +3.5 ± 1.7 by the rows", "appears"),
        ("SST-2", 872, 0.860, 0.830, "83.0 (86.0); updated +3.0 ± 1.7 by the rows", "cannot be said"),
        ("RTE", 277, 0.640, 0.570, "57.0 (64.0); updated +7.0 ± 4.1 by the rows", "cannot be said"),
        ("RTE", 277, 0.520, 0.640, "64.0 (52.0); updated -12.0 ± 4.2 by the rows", "does not appear"),
    ],
)
def test_the_rows_of_dev_decide_how_far_scores_must_be_apart(
    task: str, size: int, updated: float, frozen: float, told: str, verdict: str, tmp_path: Path
) -> None:
    finetuned(tmp_path, "init-resm", task, [updated], "updated", rows=size)
    finetuned(tmp_path, "init-resm", task, [frozen], "frozen", rows=size)
    (row,) = found_rows(tmp_path)
    assert row.what == f"{task} on dev, +Init +ResM, values frozen (and updated)"
    assert (row.ours.text(), row.finding, row.verdict) == (told, "frozen values score less", verdict)
    (line,) = lines_of(tmp_path / "compared.csv")
    assert (line["rows"], line["row_by_row"], line["seeds"], line["seeds_error"]) == (str(size), "no", "1", "")


def test_several_seeds_must_say_the_same(tmp_path: Path) -> None:
    """Seeds of the fine-tuning: medians as in the paper, and the differences seed by seed."""
    finetuned(tmp_path, "init", "SST-2", [0.70, 0.71, 0.69, 0.10])
    finetuned(tmp_path, "init-resm", "SST-2", [0.90, 0.91, 0.90], "updated")
    (row,) = found_rows(tmp_path)
    # .2, .2 and .21; the fourth seed is of one model alone.
    assert (
        row.ours.text() == "90.0 (69.5; 50.9); +20.3 ± 1.8 by the rows, ± 0.3 by 3 seeds" and row.verdict == "appears"
    )
    finetuned(tmp_path, "init-resm", "SST-2", [0.90, 0.91, 0.50], "updated")
    (row,) = found_rows(tmp_path)
    assert row.ours.text().endswith("± 13.0 by 3 seeds") and row.verdict == "cannot be said"


def test_seeds_of_the_pretraining_come_before_those_of_the_fine_tuning(tmp_path: Path) -> None:
    for run, values, memory in (
        ("dense", [0.70, 0.72], None), ("dense-seed2", [0.60, 0.62], None),
        ("init-resm", [0.90, 0.92], "updated"), ("init-resm-seed2", [0.80, 0.82], "updated"),
    ):  # fmt: skip
        evaluated(tmp_path, run, {"valid": 9.0})
        finetuned(tmp_path, run, "SST-2", values, memory)
    (row,) = found_rows(tmp_path)
    assert (
        row.ours.text() == "86.0 (66.0; 50.9); +20.0 ± 2.0 by the rows, ± 0.0 by 2 seeds" and row.verdict == "appears"
    )
    finetuned(tmp_path, "init-resm-seed2", "SST-2", [0.70, 0.72], "updated")
    # 20 and 10: t of two seeds is 12.7.
    (row,) = found_rows(tmp_path)
    assert row.ours.text().endswith("± 5.0 by 2 seeds") and row.verdict == "cannot be said"


def test_a_fine_tuning_with_a_name_of_its_own_is_another_one(tmp_path: Path) -> None:
    finetuned(tmp_path, "dense", "SST-2", [0.80])
    finetuned(tmp_path, "init-resm", "SST-2", [0.92], "updated", "slow")
    assert not found_rows(tmp_path) and not (tmp_path / "compared.csv").exists()
    # A scale may leave the frozen values out.
    finetuned(tmp_path, "init-resm", "SST-2", [0.86], "updated")
    (row,) = found_rows(tmp_path)
    assert row.ours.text().startswith("86.0 (80.0; 50.9)")
