"""docs/results.md is what results/*.json say, and no other page has a measured figure that they do not have."""

import csv
import re
from pathlib import Path
from types import ModuleType

import pytest

from distlm.analysis.papers import awd_lstm, causal_pkm, knnlm, pkm_plm
from distlm.analysis.papers.seeds import Cell, Difference
from distlm.analysis.results.page import numbers, numbers_of, page, read_results, tables
from distlm.results_page.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
RESULTS = read_results(ROOT / "results")
PAPERS: dict[str, ModuleType] = {
    "awd-lstm": awd_lstm, "causal-pkm": causal_pkm, "knnlm": knnlm, "pkm-plm": pkm_plm,
}  # fmt: skip
"""Experiment → what makes the rows of its record from its tables."""
MADE = {"results.md", "configuration.md", "files.md"}
"""Made from records, schema and docstrings."""
PAGES = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in MADE)]
UNITS = r"%|×|times\b|ms\b|s\b|seconds?\b|minutes?\b|h\b|[A-Za-z]+/s\b|[kMGT]i?B\b|points?\b|µs\b"
FIGURE = re.compile(rf"(?<![\w.,])(?:[\d,]*\.\d+|[\d,]*\d(?= ?(?:{UNITS})))")
CODE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)\s]*\)", re.DOTALL)
VERSIONS = re.compile(r"(?:Python|torch|CUDA|Slurm|version) \(?\d[\d.]*(?:(?:,| to| or|, or) \d[\d.]*)*")
NOT_MEASURED = {
    "awd-lstm.md": {
        # The difference of two formulas; figures of the paper and of the authors' README for what was not trained here.
        "0.01", "0.03", "56.5", "57.3", "58.9", "60.7", "61.0", "61.2", "61.3", "62.7", "63.7", "64.7", "65.1", "65.6",
        "66.3", "67.4", "68.0", "68.9",
        # What follows from settings, and counts of <unk>.
        "0.08", "15.7", "28.4", "30.4",
        # Student's t.
        "4.3", "12.7", "95",
    },
    # Waits and lead times, which are settings; memory as `distlm plan` computes it.
    "cluster.md": {"120", "180", "4.9", "5.5", "5.6", "6.4", "6.9"},
    # A bound of the rule, and what `distlm plan` computes.
    "faiss-index.md": {"1.11", "90"},
    # Goals, versions of other software, and the size of one of its files.
    "gpu.md": {"0.95", "135", "2.13", "2.28", "2.29", "9.10", "99.9"},
    # Sizes that follow from the settings, Student's t, and margins.
    "pkm.md": {"517.4", "4.3", "12.7", "95", "1", "3"},
    # Counts that follow from settings or of <unk>, a perplexity of the paper, and Student's t.
    "regularized.md": {"987", "19.99", "3.03", "226.7", "7.4", "22.1", "4.3", "95"},
    # Sizes that follow from the settings.
    "scale.md": {"47"},
}  # fmt: skip
"""Page → its decimal numbers and numbers with a unit that nobody measured."""


def figures(text: str) -> set[str]:
    """Decimal numbers, and numbers with a unit of time, size, rate or ratio; not in code, links, versions."""
    return set(FIGURE.findall(VERSIONS.sub(" ", CODE.sub(" ", text))))


def test_the_page_is_made_from_the_records() -> None:
    made = page(RESULTS)
    assert (ROOT / "docs/results.md").read_text("utf-8") == made, "run: python -m distlm.results_page > docs/results.md"
    assert len(made.splitlines()) < 200, "what is superseded goes, and details into tables"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_figure_on_a_page_is_in_a_record(path: Path) -> None:
    """Figures in words ("twice", "a third") and whole numbers without a unit are not seen, and a figure that by chance
    is in some record passes: this keeps tables of figures and ratios out of the pages, no more."""
    known = {number for record in RESULTS.values() for number in numbers(record)}
    shown, passed = figures(path.read_text("utf-8")), NOT_MEASURED.get(path.name, set())
    missing = {found for found in shown - passed if not {*numbers_of(found)} <= known}
    assert not missing, "measured: into results/NAME.json; else: into NOT_MEASURED"
    assert passed <= shown, "no longer on the page: out of NOT_MEASURED"


def test_what_looks_like_a_measured_figure() -> None:
    text = (
        "162.11 and .85, 12 %, 3.8×, 10 times, 1,240 MB/s, 5 s and 20s; Python 3.11 to 3.13, 2,088 keys, [3](x.md#4.5)"
    )
    assert figures(text) == {"162.11", ".85", "12", "3.8", "10", "1,240", "5", "20"}
    assert not figures("`lr=0.1` and\n```sh\nwait 3.5 s\n```\n")


@pytest.mark.parametrize("name", RESULTS)
def test_a_record_is_of_nobody_s_machine(name: str) -> None:
    text = (ROOT / "results" / f"{name}.json").read_text("utf-8")
    assert not re.search(r"(?<!\w)/(?:home|root|tmp|work|mnt|data|scratch|Users)/", text)
    assert RESULTS[name].commands and re.fullmatch(r"\d{4}-\d\d-\d\d", RESULTS[name].date)


def test_the_command_prints_the_page_and_all_of_a_record() -> None:
    assert main([]) == page(RESULTS)
    assert main(["index-codes"]) == tables(RESULTS["index-codes"]) == main([str(ROOT / "results/index-codes.json")])
    named = {name for path in PAGES for name in re.findall(r"results_page\s([a-z][\w-]+)", path.read_text("utf-8"))}
    assert named and named <= {*RESULTS}


def experiment(name: str) -> str:
    """Of `distlm reproduce`; empty for a record of something else."""
    words = RESULTS[name].commands[0].split()
    return words[2] if words[:2] == ["distlm", "reproduce"] else ""


@pytest.mark.parametrize("name", [name for name in RESULTS if experiment(name) in PAPERS])
def test_the_verdicts_of_a_record_follow_from_its_figures(name: str, tmp_path: Path) -> None:
    paper, record = PAPERS[experiment(name)], RESULTS[name]
    files = {title: file for file, title in paper.TABLES.items()}
    for table in record.tables:
        if table.title in files:
            with (tmp_path / files[table.title]).open("w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerow([column.name for column in table.columns])
                writer.writerows(["" if cell is None else cell for cell in line] for line in table.rows)
    made = {row.what: row for row in paper.rows(tmp_path)}
    judged = {row.what: (row.finding, row.verdict) for row in record.rows if row.verdict}
    assert judged == {what: (made[what].finding, made[what].verdict) for what in judged if what in made}


@pytest.mark.parametrize("name", [name for name in RESULTS if experiment(name) == "regularized-knnlm"])
def test_the_verdicts_on_regularised_training_follow_from_means_and_deviations(name: str) -> None:
    """By the differences seed by seed, or of the two means where those were not kept; of three seeds."""
    for row in RESULTS[name].rows:
        if row.finding != "some ω > 0 is best":
            continue
        if "seed by seed" in row.ours.shown:
            mean, error = row.ours.numbers[-2:]
            apart = Difference(mean, error, borrowed=False, degrees=2)
        else:
            (own, spread), (other, spread_of_other) = row.ours.numbers[:2], row.ours.numbers[2:]
            # Three figures with that mean and deviation.
            apart = Difference.of_means(
                Cell([own - spread, own, own + spread]),
                Cell([other - spread_of_other, other, other + spread_of_other]),
            )
        assert row.verdict == apart.falls(), row.what
