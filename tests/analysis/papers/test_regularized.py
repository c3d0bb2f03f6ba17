"""The tables and the figure of the regularised kNN-LM, from runs whose perplexities are known."""

import csv
import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
from support.pictures import description
from support.records import unsealed

from distlm.analysis.papers.regularized import Cell, fixed_perplexity, rows, write_tables
from distlm.analysis.tables import NothingFinished
from distlm.config.schema import RunConfig
from distlm.data.records import EditionMatch
from distlm.data.tokens import TokenFiles
from distlm.knnlm.scoring import interpolate, mean_loss
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.tune.records import Tuned
from distlm.knnlm.tune.stage import split_knn_log_probs
from distlm.runtime.files import read_json, write_json
from distlm.runtime.records import given
from distlm.runtime.rundir import RunDir


def place(root: Path, finished: RunConfig, name: str, fixed: float, tuned: float) -> None:
    """A copy of what the tables read of a real run, with other perplexities with neighbours."""
    source, folder = RunDir(Path(finished.run_dir)), root / name
    folder.mkdir(parents=True)
    shutil.copy(source.metrics.path, folder)
    results, knn = (unsealed(path) for path in (source.results, source.tuned))
    results["splits"]["valid"]["knn"]["perplexity"] = tuned
    grid = knn["grid"]
    at = grid["temperatures"].index(1.0), grid["lambdas"].index(0.3)
    grid["loss_nats"][grid["ks"].index(16)][at[0]][at[1]] = math.log(fixed)
    edge = "the best temperature=0.001 is the smallest of knn.temperatures; add smaller ones"
    knn["edges"] = [edge] if name == "w1-s1" else []
    write_json(folder / "results.json", results)
    write_json(folder / "knn.json", knn)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_fixed_point_is_that_of_the_neighbours(finished: RunConfig) -> None:
    run = RunDir(Path(finished.run_dir))
    neighbours = Neighbours.open(run.neighbours("valid"))
    scores = split_knn_log_probs(neighbours, 1.0, [16])[0]
    wanted = math.exp(mean_loss(interpolate(neighbours.log_probs(), scores, 0.3)))
    tuned = Tuned.read(run.tuned)
    # The grid is kept to about 1e-6 nats.
    assert fixed_perplexity(tuned) == pytest.approx(wanted, rel=1e-5)
    assert tuned.grid
    tuned.grid.lambdas = [0.25 if weight == 0.3 else weight for weight in tuned.grid.lambdas]
    assert fixed_perplexity(tuned) is None


def test_means_deviations_and_the_statement(finished: RunConfig, tmp_path: Path) -> None:
    plain, one, ten = (74.0, 74.2, 74.4), (71.0, 71.1, 71.2), (80.0, 81.0, 82.0)
    for seed in range(3):
        for weight, values in (("0", plain), ("1", one), ("10", ten)):
            # With the settings tuned the difference is within the deviation.
            place(tmp_path, finished, f"w{weight}-s{seed + 1}", values[seed], 60 + seed - 0.1 * (weight == "1"))
    place(tmp_path, finished, "queue-w1-s1", 70.0, 59.0)
    (tmp_path / "w0.5-s1").mkdir()
    (tmp_path / "logs").mkdir()
    text = write_tables(tmp_path)
    table = (tmp_path / "table.md").read_text("utf-8")
    assert table.strip() in text
    head, shown = cells(table.splitlines()[0]), [cells(line) for line in table.splitlines()[2:6]]
    assert [row[:2] for row in shown] == [["L2, ω = 0", "3"], ["L2, ω = 1", "3"], ["L2, ω = 10", "3"],
                                         ["queues, ω = 1", "1"]]  # fmt: skip
    column = head.index("+ kNN, λ 0.3, T 1")
    assert [row[column] for row in shown] == ["74.20 ± 0.20", "71.10 ± 0.10", "81.00 ± 1.00", "70.00"]
    assert shown[3][column + 1] == "59.00"
    results = read_json(RunDir(Path(finished.run_dir)).results, "")
    assert shown[3][head.index("test LM")] == f"{results['splits']['test']['lm']['perplexity']:.2f}"
    lines = [json.loads(line) for line in (tmp_path / "w0-s1" / "metrics.jsonl").read_text("utf-8").splitlines()]
    last = [line for line in lines if line.get("step", 0) > 10.8 and "train/loss" in line]
    assert len(last) == 2
    train = math.exp(statistics.fmean(line["train/loss"] for line in last))
    assert shown[3][head.index("train")] == f"{train:.2f}"
    assert shown[3][head.index("‖r‖")] == f"{statistics.fmean(line['train/tap_norm'] for line in last):.2f}"
    assert "L2, λ = 0.3, T = 1: the paper's effect appears: ω = 1 gives 71.10 ± 0.10 where ω = 0 gives 74.20" in table
    assert "L2, λ, T and k tuned on valid: the paper's effect does not appear: ω = 1 gives 60.90 ± 1.00" in table
    assert "less than the standard deviation apart" in table
    assert "queues, λ = 0.3, T = 1: the paper's effect appears: ω = 1 gives 70.00" in table
    assert "Warning: the best temperature=0.001 is the smallest of knn.temperatures; add smaller ones (w1-s1)." in table
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as stream:
        raw = list(csv.DictReader(stream))
    assert len(raw) == 10 and float(raw[4]["fixed"]) == pytest.approx(71.1)
    with (tmp_path / "figure1.csv").open(encoding="utf-8", newline="") as stream:
        points = list(csv.DictReader(stream))
    (point,) = (row for row in points if (row["penalty"], row["perplexity"], row["weight"]) == ("L2", "fixed", "10.0"))
    assert float(point["standard_deviation"]) == pytest.approx(1)
    lines_of_page = {row.what: row for row in rows(tmp_path)}
    fixed = lines_of_page["L2, + kNN at λ 0.3 and T 1: the best ω > 0, 1 (and ω = 0)"]
    assert fixed.ours.text() == "71.10 ± 0.10 (74.20 ± 0.20)" and fixed.verdict == "appears"
    assert lines_of_page["L2, + kNN tuned: the best ω > 0, 1 (and ω = 0)"].verdict == "does not appear"
    assert lines_of_page["queues, + kNN at λ 0.3 and T 1: the best ω > 0, 1 (and ω = 0)"].verdict == "appears"
    seen = description(tmp_path / "figure1.png")
    assert "L2: + kNN, λ 0.3, T 1: ω = 1;" in seen and "queues: + kNN, tuned: ω = 1." in seen


def test_the_paper_s_numbers_stand_beside_ours_on_its_texts_only(finished: RunConfig, tmp_path: Path) -> None:
    for weight in ("0", "0.1"):
        place(tmp_path, finished, f"w{weight}-s1", 70.0, 70.0)
    assert "74.11" not in write_tables(tmp_path)
    meta = TokenFiles.open(RunDir(Path(finished.run_dir)).tokens(finished)).meta
    meta.edition = EditionMatch("WikiText-2", ["token counts"], [], exact=True)
    meta.write(tmp_path / "tokens" / "tokens" / "meta.json")
    text = write_tables(tmp_path)
    assert all(value in text for value in ("19.99", "75.96", "74.11", "73.13"))
    assert "one seed alone does not tell" in text
    by_what = {row.what: row for row in rows(tmp_path)}
    fixed = by_what["L2, + kNN at λ 0.3 and T 1: the best ω > 0, 0.1 (and ω = 0)"]
    assert fixed.verdict == "cannot be said" and given(fixed.paper).numbers == [70.63, 74.11]


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    with pytest.raises(NothingFinished, match="no run is finished yet"):
        write_tables(tmp_path)
    assert Cell.of([None]) is None
