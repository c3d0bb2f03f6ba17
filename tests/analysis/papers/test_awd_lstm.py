"""The tables of `distlm reproduce awd-lstm`, from results whose numbers are written here."""

import csv
from pathlib import Path

import pytest
from msgspec import UNSET
from support.records.examples import example

from distlm.analysis.papers.awd_lstm import rows as record_rows
from distlm.analysis.papers.awd_lstm import write_tables
from distlm.analysis.results.from_csv import lines_of
from distlm.analysis.tables import NothingFinished
from distlm.config.load import load_config
from distlm.data.records import EditionMatch, TokensMeta
from distlm.knnlm.evaluate.records import Results, SplitResults
from distlm.knnlm.tune.records import Figures
from distlm.runtime.metrics import PROCESSOR_SECONDS
from distlm.runtime.records import given
from distlm.runtime.rundir import RunDir
from distlm.training.records import LmResults, LmSplit


def evaluated(folder: Path, valid: float | None, test: float | None) -> None:
    """None: knn.splits did not have that split."""
    found = example(LmResults)
    found.splits = {
        split: LmSplit(tokens=9, loss_nats=2.0, perplexity=value)
        for split, value in (("valid", valid), ("test", test))
        if value is not None
    }
    found.model.step = 600
    found.write(folder / "lm.json")


def cached(folder: Path, valid: float, test: float | None = None) -> None:
    """The language model of the same states has 10 more."""
    results = example(Results)
    results.splits = {
        split: SplitResults(tokens=9, blocks=1, lm=Figures(4.0, value + 10), cache=Figures(4.0, value))
        for split, value in (("valid", valid), ("test", test))
        if value is not None
    }
    results.write(folder / "results.json")


def of_corpus(root: Path, run: str, name: str | None, exact: bool = True) -> None:
    meta = example(TokensMeta)
    meta.edition = None if name is None else EditionMatch(name, [], [], exact)
    meta.write(root / run / "tokens" / "meta.json")


def table(root: Path) -> dict[str, list[str]]:
    lines = [line for line in write_tables(root).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows[2:]}


def test_what_is_finished_stands_beside_both_corpora_of_the_paper(tmp_path: Path) -> None:
    evaluated(tmp_path / "awd-lstm", 70.0, 67.25)
    evaluated(tmp_path / "no-weight-drop", 80.5, 77.0)
    cached(tmp_path / "awd-lstm", 55.0, 53.5)
    rows = table(tmp_path)
    paper = ["60.00", "57.30", "0.00", "68.60", "65.80", "0.00"]
    assert rows["AWD-LSTM"] == ["600", "", "70.00", "67.25", "0.00", *paper, ""]
    assert rows["– weight drop"][:5] == ["600", "", "80.50", "77.00", "10.50"]
    assert rows["– weight drop"][5:] == [
        "71.10", "68.90", "11.10", "78.40", "74.90", "9.80", "cannot be said (one seed)"
    ]  # fmt: skip
    # Its Δ is against the language model of the same states, 65, not the 70 of `distlm evaluate`.
    assert rows["AWD-LSTM + neural cache"][:5] == ["", "", "55.00", "53.50", "-10.00"]
    assert rows["AWD-LSTM + neural cache"][-1] == "appears"
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as stream:
        raw = list(csv.DictReader(stream))
    assert [row["run"] for row in raw] == ["awd-lstm", "no-weight-drop", "cache"]
    assert raw[2]["valid"] == "55.0"
    base, dropped, cache = record_rows(tmp_path)
    assert base.ours.text() == "70.00 / 67.25" and base.finding is UNSET
    assert dropped.ours.text() == "80.50 / 77.00 (+10.50)"
    assert given(dropped.paper).text() == "WikiText-2: 78.4 / 74.9 (+9.8)"
    assert (dropped.verdict, cache.verdict, cache.finding) == ("cannot be said", "appears", "the cache lowers it")
    assert cache.ours.numbers == [55.0, 53.5, -10.0]


@pytest.mark.parametrize(
    ("valid", "told"),
    [
        (74.0, "appears (standard error 0.71, borrowed)"),
        (72.0, "cannot be said (standard error 0.71, borrowed)"),
        (66.0, "does not appear (standard error 0.71, borrowed)"),
    ],
)
def test_an_effect_of_one_seed_borrows_the_deviation_of_the_whole_model(
    tmp_path: Path, valid: float, told: str
) -> None:
    """.5 over three seeds of the whole model: of two independent runs √2 as much, and t of three seeds is 4.3: 3.04."""
    for name, value in (("awd-lstm", 70.0), ("awd-lstm-seed2", 70.5), ("awd-lstm-seed10", 69.5)):
        evaluated(tmp_path / name, value, value)
    evaluated(tmp_path / "no-ar-tar", valid, valid)
    rows = table(tmp_path)
    assert rows["AWD-LSTM"][2] == "70.00 ± 0.50"
    assert rows["– AR and TAR"][-1] == told
    base, ar = record_rows(tmp_path)
    assert base.ours.text() == "70.00 / 70.00, ± 0.50 on valid"
    assert ar.verdict == told.partition(" (")[0]
    assert ar.ours.text() == f"{valid:.2f} / {valid:.2f} ({valid - 70:+.2f} ± 0.71)"
    raw = (tmp_path / "table.csv").read_text("utf-8")
    assert raw.index("awd-lstm-seed2") < raw.index("awd-lstm-seed10")


def test_an_effect_is_told_seed_by_seed(tmp_path: Path) -> None:
    """Seeds are 4 apart and each loses .95 or 1.05 without the part: 1 ± .05, which is more than t of
    two seeds, 12.7, times .05. Seed 1 is of the whole model alone."""
    for run, value in (("awd-lstm", 80.0), ("awd-lstm-seed2", 70.0), ("awd-lstm-seed3", 74.0)):
        evaluated(tmp_path / run, value, value)
    for run, value in (("no-weight-drop-seed2", 70.95), ("no-weight-drop-seed3", 75.05)):
        evaluated(tmp_path / run, value, value)
    rows = table(tmp_path)
    # The means, 74.67 and 73, would say the contrary.
    assert rows["– weight drop"][4] == "1.00" and rows["– weight drop"][-1] == "appears (standard error 0.05)"
    _, dropped = record_rows(tmp_path)
    assert dropped.ours.text().startswith("73.00 / 73.00 (+1.00 ± 0.05)") and dropped.verdict == "appears"


def test_without_a_seed_in_common_there_is_no_difference(tmp_path: Path) -> None:
    evaluated(tmp_path / "awd-lstm", 70.0, 70.0)
    evaluated(tmp_path / "no-weight-drop-seed2", 90.0, 90.0)
    assert (table(tmp_path)["– weight drop"][4], table(tmp_path)["– weight drop"][-1]) == ("", "")
    assert record_rows(tmp_path)[1].verdict is UNSET


@pytest.mark.parametrize(
    ("corpora", "told"),
    [
        ({"tokens": "Penn Treebank"}, "Penn Treebank"),
        # The beginning of each split is nobody's corpus, but the dictionary is of all of it.
        ({"words": "Penn Treebank", "tokens": None}, "Penn Treebank"),
        ({"tokens": "WikiText-2"}, "WikiText-2"),
        ({"tokens": "WikiText-103"}, "WikiText-2"),
        ({"tokens": None}, "WikiText-2"),
    ],
)
def test_the_paper_s_figures_are_of_the_corpus_that_the_runs_have(
    tmp_path: Path, corpora: dict[str, str | None], told: str
) -> None:
    for run, name in corpora.items():
        of_corpus(tmp_path, run, name)
    for run in ("awd-lstm", "no-weight-drop"):
        evaluated(tmp_path / run, 70.0, 67.0)
    cached(tmp_path / "awd-lstm", 55.0, 53.5)
    write_tables(tmp_path)
    shown = [given(row.paper).text() for row in record_rows(tmp_path)]
    assert shown == {
        "Penn Treebank": [
            "Penn Treebank: 60.0 / 57.3", "Penn Treebank: 71.1 / 68.9 (+11.1)", "Penn Treebank: 53.9 / 52.8 (-6.1)",
        ],
        "WikiText-2": ["WikiText-2: 68.6 / 65.8", "WikiText-2: 78.4 / 74.9 (+9.8)", "WikiText-2: 53.8 / 52.0 (-14.8)"],
    }[told]  # fmt: skip


def test_a_near_miss_stands_beside_the_corpus_that_it_nearly_is(tmp_path: Path) -> None:
    of_corpus(tmp_path, "tokens", "Penn Treebank", exact=False)
    evaluated(tmp_path / "awd-lstm", 70.0, 67.0)
    write_tables(tmp_path)
    assert given(record_rows(tmp_path)[0].paper).text() == "Penn Treebank: 60.0 / 57.3"


@pytest.mark.parametrize(
    ("recipe", "corpus", "told"),
    [
        (
            "awd-lstm-wikitext2-released", "WikiText-2",
            ["README, WikiText-2: 67.4 / 64.7", "README, WikiText-2: 68.7 / 65.6 (+1.3)",
             "WikiText-2: 78.4 / 74.9 (+9.8)", "README, WikiText-2: 52.2 / 50.6 (-15.2)"],
        ),
        (
            "awd-lstm-ptb-released", "Penn Treebank",
            ["README, Penn Treebank: 58.8 / 56.5", "README, Penn Treebank: 61.2 / 58.8 (+2.4)",
             "Penn Treebank: 71.1 / 68.9 (+11.1)", "README, Penn Treebank: 53.2 / 52.5 (-5.6)"],
        ),
        (
            "awd-lstm-ptb", "Penn Treebank",
            ["Penn Treebank: 60.0 / 57.3", "Penn Treebank: 60.7 / 58.8 (+0.7)", "Penn Treebank: 71.1 / 68.9 (+11.1)",
             "Penn Treebank: 53.9 / 52.8 (-6.1)"],
        ),
    ],
)  # fmt: skip
def test_released_settings_stand_beside_the_readme_where_it_has_figures(
    tmp_path: Path, recipe: str, corpus: str, told: list[str]
) -> None:
    of_corpus(tmp_path, "tokens", corpus)
    removed = {
        "awd-lstm": (),
        "no-finetuning": ("awd.finetune_epochs=0",),
        "no-weight-drop": ("lstm.weight_dropout=0",),
    }
    for run, settings in removed.items():
        folder = tmp_path / run
        config = load_config(recipe, [f"name={run}", f"run_dir={folder}", "launch.ranks=1", *settings])
        RunDir(folder).open_stage(config, "train")
        evaluated(folder, 70.0, 67.0)
    cached(tmp_path / "awd-lstm", 55.0, 53.5)
    write_tables(tmp_path)
    assert [given(row.paper).text() for row in record_rows(tmp_path)] == told


def test_valid_alone_is_enough(tmp_path: Path) -> None:
    """knn.splits=[valid]."""
    for run, value in (("awd-lstm", 70.0), ("awd-lstm-seed2", 71.0), ("no-weight-drop", 80.0)):
        evaluated(tmp_path / run, value, None)
    cached(tmp_path / "awd-lstm", 55.0)
    shown = table(tmp_path)
    assert shown["AWD-LSTM"][2:4] == ["70.50 ± 0.71", ""]
    assert shown["AWD-LSTM + neural cache"][2:5] == ["55.00", "", "-10.00"]
    base, dropped, cache = record_rows(tmp_path)
    assert base.ours.text() == "70.50 / –, ± 0.71 on valid" and dropped.ours.text().startswith("80.00 / – (+10.00")
    assert cache.ours.text() == "55.00 / – (-10.00)" and cache.verdict == "appears"


def test_one_run_without_test_leaves_the_others_theirs(tmp_path: Path) -> None:
    evaluated(tmp_path / "awd-lstm", 70.0, 67.0)
    evaluated(tmp_path / "no-weight-drop", 80.0, None)
    write_tables(tmp_path)
    assert [row.ours.text() for row in record_rows(tmp_path)] == ["70.00 / 67.00", "80.00 / – (+10.00)"]


def test_a_run_without_valid_is_none_that_can_be_compared(tmp_path: Path) -> None:
    evaluated(tmp_path / "awd-lstm", None, 67.0)
    with pytest.raises(NothingFinished):
        write_tables(tmp_path)
    evaluated(tmp_path / "no-weight-drop", 80.0, 77.0)
    assert list(table(tmp_path)) == ["– weight drop"]


def test_the_epoch_of_the_trigger_and_the_processor_time(tmp_path: Path) -> None:
    """The first time that it fired; not that of fine-tuning, which ends by it."""
    fired = {"awd-lstm": (3,), "awd-lstm-seed2": (4, 5), "plain-sgd": ()}
    for run, epochs in fired.items():
        evaluated(tmp_path / run, 70.0, 70.0)
        metrics = RunDir(tmp_path / run).metrics
        for epoch in range(1, 7):
            line = {"train/epoch": epoch, "train/phase": "sgd", "trigger/fired": epoch in epochs}
            metrics.write("train", line, step=10 * epoch)
        metrics.write("train", {"train/epoch": 9, "train/phase": "finetune", "trigger/fired": True}, step=90)
        metrics.write("reproduce", {PROCESSOR_SECONDS: 1800.0})
    rows = table(tmp_path)
    assert rows["AWD-LSTM"][1] == "3/4" and rows["– NT-ASGD (plain SGD)"][1] == ""
    spent = record_rows(tmp_path)[-1]
    assert (spent.what, spent.ours.text()) == ("processor time of 3 runs, user and system", "1.50 hours")
    assert len(lines_of(tmp_path / "processor.csv")) == 3
