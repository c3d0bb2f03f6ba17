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

from distlm.analysis.papers.regularized import rows, write_tables
from distlm.analysis.papers.regularized_runs import fixed_perplexity, lambda_tuned, read_runs
from distlm.analysis.papers.seeds import Cell
from distlm.analysis.tables import NothingFinished
from distlm.config.schema import RunConfig
from distlm.data.records import EditionMatch
from distlm.data.tokens import TokenFiles
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.scoring import interpolate, mean_loss
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.tune.records import Tuned
from distlm.knnlm.tune.stage import split_knn_log_probs
from distlm.runtime.files import write_json
from distlm.runtime.metrics import PROCESSOR_SECONDS, MetricsFile
from distlm.runtime.records import given
from distlm.runtime.rundir import RunDir


def place(
    root: Path, finished: RunConfig, name: str, fixed: float, tuned: float, at_one: float | None = None,
    processor_s: float | None = None, tuned_test: float | None = None,
) -> None:  # fmt: skip
    """A copy of what the tables read of a real run, with other perplexities with neighbours.

    at_one: with λ tuned at T = 1, which is then 0.15; else it is 0.3.
    """
    source, folder = RunDir(Path(finished.run_dir)), root / name
    folder.mkdir(parents=True)
    shutil.copy(source.metrics.path, folder)
    results, knn = (unsealed(path) for path in (source.results, source.tuned))
    results["splits"]["valid"]["knn"]["perplexity"] = tuned
    if tuned_test is not None:
        results["splits"]["test"]["knn"]["perplexity"] = tuned_test
    grid = knn["grid"]
    losses = grid["loss_nats"][grid["ks"].index(16)][grid["temperatures"].index(1.0)]
    losses[:] = [math.log(fixed) + 1] * len(losses)
    losses[grid["lambdas"].index(0.3)] = math.log(fixed)
    if at_one is not None:
        losses[grid["lambdas"].index(0.15)] = math.log(at_one)
    if processor_s is not None:
        MetricsFile(folder / "metrics.jsonl").write("train", {PROCESSOR_SECONDS: processor_s})
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
    losses = {
        weight: math.exp(mean_loss(interpolate(neighbours.log_probs(), scores, weight)))
        for weight in tuned.grid.lambdas
    }
    best = lambda_tuned(tuned)
    assert best and losses[best[0]] == min(losses.values()) and best[1] == pytest.approx(losses[best[0]], rel=1e-5)
    tuned.grid.lambdas = [0.25 if weight == 0.3 else weight for weight in tuned.grid.lambdas]
    assert fixed_perplexity(tuned) is None and lambda_tuned(tuned)
    tuned.grid.temperatures = [1.5 if temperature == 1 else temperature for temperature in tuned.grid.temperatures]
    assert lambda_tuned(tuned) is None


def test_on_test_there_are_the_paper_s_settings_too(finished: RunConfig) -> None:
    """Of a real run, with the λ that is best on valid; its grid is of valid alone."""
    run = RunDir(Path(finished.run_dir))
    (read,) = read_runs(run.root.parent)
    assert read.lambda_t1 is not None
    neighbours = Neighbours.open(run.neighbours("test"))
    scores = split_knn_log_probs(neighbours, 1.0, [16])[0]
    for name, weight in (("fixed_test", 0.3), ("lambda_tuned_test", read.lambda_t1)):
        wanted = math.exp(mean_loss(interpolate(neighbours.log_probs(), scores, weight)))
        assert read.measures[name] == pytest.approx(wanted, rel=1e-12)
        assert read.measures[name] != pytest.approx(read.measures[name.removesuffix("_test")], rel=1e-6)


def test_means_deviations_and_the_verdicts(finished: RunConfig, tmp_path: Path) -> None:
    plain, one, ten = (74.1, 74.3, 74.2), (71.0, 71.1, 71.2), (80.0, 81.0, 82.0)
    gained = {"0": (0.0, 0.0, 0.0), "1": (0.2, -0.1, 0.2), "10": (-5.0, -5.0, -5.0)}
    for seed in range(3):
        for weight, values in (("0", plain), ("1", one), ("10", ten)):
            at_one = 70 + seed / 10 if weight == "0" else None
            # Seeds are 1 apart. ω = 1 is best on valid with all settings tuned; on test it is ω = 10.
            tuned, on_test = 60 + seed - 0.1 * (weight == "1"), 65.0 + seed + gained[weight][seed]
            place(tmp_path, finished, f"w{weight}-s{seed + 1}", values[seed], tuned, at_one, tuned_test=on_test)
    place(tmp_path, finished, "queue-w1-s1", 71.05, 59.0, tuned_test=58.0)
    (tmp_path / "w0.5-s1").mkdir()
    (tmp_path / "logs").mkdir()
    text = write_tables(tmp_path)
    table = (tmp_path / "table.md").read_text("utf-8")
    assert table.strip() in text
    head, shown = cells(table.splitlines()[0]), [cells(line) for line in table.splitlines()[2:6]]
    assert [row[:2] for row in shown] == [["L2, ω = 0", "3"], ["L2, ω = 1", "3"], ["L2, ω = 10", "3"],
                                         ["queues, ω = 1", "1"]]  # fmt: skip
    column = head.index("+ kNN, λ 0.3, T 1")
    assert [row[column] for row in shown] == ["74.20 ± 0.10", "71.10 ± 0.10", "81.00 ± 1.00", "71.05"]
    column = head.index("+ kNN, λ tuned, T 1")
    assert [row[column] for row in shown] == ["70.10 ± 0.10", "71.10 ± 0.10", "81.00 ± 1.00", "71.05"]
    assert [row[head.index("λ at T 1")] for row in shown] == ["0.15", "0.3", "0.3", "0.3"]
    assert shown[3][column + 1] == "59.00"
    found = Results.read(RunDir(Path(finished.run_dir)).results)
    assert shown[3][head.index("test LM")] == f"{found.splits['test'].lm.perplexity:.2f}"
    lines = [json.loads(line) for line in (tmp_path / "w0-s1" / "metrics.jsonl").read_text("utf-8").splitlines()]
    until = found.model.step
    assert until is not None
    last = [line for line in lines if 0.9 * until < line.get("step", 0) <= until and "train/loss" in line]
    assert last
    train = math.exp(statistics.fmean(line["train/loss"] for line in last))
    assert shown[3][head.index("train")] == f"{train:.2f}"
    ratio = found.splits["valid"].lm.perplexity / train
    assert shown[3][head.index("valid / train")] == f"{ratio:.2f}"
    assert shown[0][head.index("train")] == f"{train:.2f} ± 0.00"
    assert shown[3][head.index("‖r‖")] == f"{statistics.fmean(line['train/tap_norm'] for line in last):.2f}"
    verdicts = {
        row[0]: row[1:]
        for row in map(cells, table.splitlines())
        if row[0].startswith(("L2, +", "queues")) and len(row) == 5
    }
    # The copies have no neighbours of test. Seed by seed 3.1, 3.2 and 3 lower.
    assert verdicts["L2, + kNN at λ 0.3 and T 1, valid: the best ω > 0, 1 (and ω = 0)"] == [
        "71.10 ± 0.10 (74.20 ± 0.10); seed by seed -3.10 ± 0.06", "WikiText-2 valid 70.63 (74.11)",
        "some ω > 0 is best", "appears",
    ]  # fmt: skip
    assert verdicts["L2, + kNN, λ tuned at T 1, valid: the best ω > 0, 1 (and ω = 0)"][-1] == "does not appear"
    tuned_row = verdicts["L2, + kNN, all tuned, test: the best ω > 0, 1 (and ω = 0)"]
    assert tuned_row[0].endswith("; seed by seed +0.10 ± 0.10") and tuned_row[-1] == "cannot be said"
    # 74.1 of the plain run with the same seed; √2 · .1 of its three seeds, for which t is 4.3.
    assert verdicts["queues, + kNN at λ 0.3 and T 1, valid: the best ω > 0, 1 (and ω = 0)"] == [
        "71.05 (74.20 ± 0.10); seed by seed -3.05 ± 0.14 (borrowed)", "WikiText-2 valid 70 (76)",
        "some ω > 0 is best", "appears",
    ]  # fmt: skip
    assert verdicts["queues, + kNN, all tuned, test: the best ω > 0, 1 (and ω = 0)"][-1] == "appears"
    assert verdicts["queues and L2, + kNN at λ 0.3 and T 1, valid: the best ω > 0, 1 and 1"] == [
        "71.05, 71.10 ± 0.10; seed by seed +0.05 ± 0.14 (borrowed)", "WikiText-2 valid 70, 70.63",
        "eq. 1 and eq. 2 give similar perplexities", "appears",
    ]  # fmt: skip
    # 58 and 65.2, ± 4.3 · 1.41.
    apart_by_far = verdicts["queues and L2, + kNN, all tuned, test: the best ω > 0, 1 and 1"]
    assert apart_by_far[-1] == "does not appear"
    assert "gain more than Student's t has at 95 %" in table
    assert "Warning: the best temperature=0.001 is the smallest of knn.temperatures; add smaller ones (w1-s1)." in table
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as stream:
        raw = list(csv.DictReader(stream))
    assert len(raw) == 10 and float(raw[4]["fixed"]) == pytest.approx(71.1)
    assert (float(raw[0]["lambda_tuned"]), float(raw[0]["lambda_t1"])) == (pytest.approx(70), 0.15)
    with (tmp_path / "figure1.csv").open(encoding="utf-8", newline="") as stream:
        points = list(csv.DictReader(stream))
    (point,) = (row for row in points if (row["penalty"], row["perplexity"], row["weight"]) == ("L2", "fixed", "10.0"))
    assert float(point["standard_deviation"]) == pytest.approx(1)
    page = {row.what: row for row in rows(tmp_path)}
    assert {what: page[what].verdict for what in verdicts} == {what: row[-1] for what, row in verdicts.items()}
    apart = page["L2, ω = 0: LM on train (and valid over train)"]
    assert apart.ours.text() == f"{train:.2f} ± 0.00 ({ratio:.2f} ± 0.00)"
    assert given(apart.paper).text() == "WikiText-2 19.99 (3.80)"
    whole = "L2, ω = 1: LM, + kNN at λ 0.3 and T 1, + kNN, λ tuned at T 1, + kNN, all tuned"
    assert page[whole].ours.text().endswith("71.10 ± 0.10, 71.10 ± 0.10, 60.90 ± 1.00")
    seen = description(tmp_path / "figure1.png")
    assert "L2: + kNN at λ 0.3 and T 1: ω = 1;" in seen and "queues: + kNN, all tuned: ω = 1." in seen


def test_the_processor_time_of_all_runs_is_stated(finished: RunConfig, tmp_path: Path) -> None:
    for seed in (1, 2):
        place(tmp_path, finished, f"w0-s{seed}", 70.0, 70.0, processor_s=1800.0 * seed)
    assert "Processor time of all stages of 2 runs: 1.50 h." in write_tables(tmp_path)
    assert "processor time of all 2 runs, h: 1.50" in {f"{row.what}: {row.ours.text()}" for row in rows(tmp_path)}
    # A run from before it was recorded.
    place(tmp_path, finished, "w1-s1", 70.0, 70.0)
    assert "of 2 runs: 1.50 h; 1 more have no record of it." in write_tables(tmp_path)
    assert "processor time of 2 of 3 runs, h" in {row.what for row in rows(tmp_path)}


def test_runs_whose_grid_has_no_temperature_of_one_have_their_other_figures(
    finished: RunConfig, tmp_path: Path
) -> None:
    for weight in ("0", "1"):
        place(tmp_path, finished, f"w{weight}-s1", 70.0, 71.0)
        tuned = unsealed(tmp_path / f"w{weight}-s1" / "knn.json")
        grid = tuned["grid"]
        grid["temperatures"] = [1.5 if value == 1 else value for value in grid["temperatures"]]
        write_json(tmp_path / f"w{weight}-s1" / "knn.json", tuned)
    table = write_tables(tmp_path).splitlines()
    head, shown = cells(table[0]), cells(table[2])
    assert [shown[head.index(name)] for name in ("+ kNN, λ 0.3, T 1", "+ kNN, λ tuned, T 1", "λ at T 1")] == [""] * 3
    assert shown[head.index("+ kNN, all tuned")] == "71.00"
    assert [row.what for row in rows(tmp_path) if row.verdict] == [
        "L2, + kNN, all tuned, test: the best ω > 0, 1 (and ω = 0)"
    ]


def test_the_paper_s_numbers_stand_beside_ours_on_its_texts_only(finished: RunConfig, tmp_path: Path) -> None:
    for weight in ("0", "0.1"):
        place(tmp_path, finished, f"w{weight}-s1", 70.0, 70.0)
    # A verdict names the text that the paper's finding is of.
    assert "75.96" not in write_tables(tmp_path)
    meta = TokenFiles.open(RunDir(Path(finished.run_dir)).tokens(finished)).meta
    meta.edition = EditionMatch("WikiText-2", ["token counts"], [], exact=True)
    meta.write(tmp_path / "tokens" / "tokens" / "meta.json")
    text = write_tables(tmp_path)
    assert all(value in text for value in ("19.99", "75.96", "74.11", "73.13"))
    by_what = {row.what: row for row in rows(tmp_path)}
    fixed = by_what["L2, + kNN at λ 0.3 and T 1, valid: the best ω > 0, 0.1 (and ω = 0)"]
    assert fixed.verdict == "cannot be said" and given(fixed.paper).numbers == [70.63, 74.11]
    meta.edition = EditionMatch("WikiText-103", ["token counts"], [], exact=True)
    meta.write(tmp_path / "tokens" / "tokens" / "meta.json")
    write_tables(tmp_path)
    found = {row.what: given(row.paper).text() for row in rows(tmp_path) if row.paper}
    assert found["L2, + kNN, all tuned, test: the best ω > 0, 0.1 (and ω = 0)"] == "WikiText-103 valid 15.89 (16.09)"


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    with pytest.raises(NothingFinished, match="no run is finished yet"):
        write_tables(tmp_path)
    assert Cell.of([None]) is None
