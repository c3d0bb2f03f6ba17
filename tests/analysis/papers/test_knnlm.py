"""The tables of `distlm reproduce knnlm`, from results whose numbers are written here."""

import csv
import math
import re
from pathlib import Path

import pytest
from msgspec import UNSET
from support.records.examples import example

from distlm.analysis.papers.knnlm import NOTES, check_settings, rows, write_tables
from distlm.analysis.tables import NothingFinished
from distlm.config.load import load_config
from distlm.config.schema import RunConfig
from distlm.data.records import SplitFacts, TokensMeta
from distlm.errors import DistlmError, UsageError
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.tune.records import Figures, Grid, Tuned
from distlm.runtime.metrics import PROCESSOR_SECONDS
from distlm.runtime.records import given
from distlm.runtime.rundir import RunDir


def finished(
    root: Path, run: str, keys: int, lm: float, knn: float, weight: float, *, words: int = 900, tuned_on: str = "valid"
) -> None:
    """`words`: of valid and test."""
    results = example(Results)
    split = next(iter(results.splits.values()))
    split.tokens = words
    split.lm, split.knn = Figures(math.log(lm), lm), Figures(math.log(knn), knn)
    results.splits = {"valid": split, "test": split}
    assert results.datastore
    results.datastore.rows = keys
    results.write(root / run / "results.json")
    tuned = example(Tuned)
    tuned.split, tuned.weight, tuned.temperature, tuned.k = tuned_on, weight, 4.0, 16
    # [ks][temperatures][lambdas]: the best of all is at k = 16, T = 4, λ = .25.
    losses = [[[math.log(knn + 8 + 4 * t + 2 * at - 8 * k) for at in range(2)] for t in range(2)] for k in range(2)]
    tuned.grid = Grid(lambdas=[0.25, 0.5], temperatures=[4.0, 1.0], ks=[1, 16], loss_nats=losses)
    tuned.write(root / run / "knn.json")


def tokens(folder: Path, valid: int, test: int) -> None:
    """Token files' record with so many <unk> in 1,000 tokens."""
    meta = example(TokensMeta)
    meta.splits = {
        split: SplitFacts(1000, 10, unk, "") for split, unk in (("train", 5), ("valid", valid), ("test", test))
    }
    meta.write(folder / "tokens" / "meta.json")


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_datastores_stand_by_their_size_and_another_domain_last(tmp_path: Path) -> None:
    with pytest.raises(NothingFinished):
        write_tables(tmp_path)
    finished(tmp_path, "whole", 2000, 160.0, 140.0, 0.25)
    finished(tmp_path, "words-500", 500, 160.0, 155.0, 0.1)
    finished(tmp_path, "domain", 90, 400.0, 300.0, 0.6)
    text = write_tables(tmp_path)
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert [row[0] for row in found[2:]] == ["500 words of train", "all of train", "another domain"]
    assert found[3][1:] == ["2,000", "160.00", "140.00", "160.00", "140.00", "0.25", "4", "16", ""]
    assert [(line["k"], round(float(line["valid"]), 6)) for line in lines(tmp_path / "k.csv")] == [
        ("1", 148),
        ("16", 140),
    ]
    over_lambda = [(line["lambda"], round(float(line["valid"]), 6)) for line in lines(tmp_path / "lambda.csv")]
    assert over_lambda == [("0.25", 140), ("0.5", 142)]
    assert all((tmp_path / f"{name}.png").stat().st_size > 0 for name in ("k", "lambda"))


def test_what_the_paper_says_is_seen_or_not(tmp_path: Path) -> None:
    finished(tmp_path, "whole", 2000, 160.0, 140.0, 0.25)
    finished(tmp_path, "words-500", 500, 160.0, 155.0, 0.3)
    finished(tmp_path, "domain", 90, 400.0, 300.0, 0.6)
    write_tables(tmp_path)
    more_k, size, weight, domain = rows(tmp_path)
    assert (more_k.ours.text(), more_k.verdict) == ("148.00; 140.00", "appears")
    assert (size.ours.text(), size.verdict) == ("155.00; 140.00", "appears")
    assert (weight.ours.text(), weight.verdict) == ("0.30; 0.25", "does not appear")
    assert (domain.ours.text(), domain.verdict) == ("400.00 → 300.00", "appears")
    assert given(domain.paper).text() == "37.13 → 24.85" and more_k.paper is UNSET


def test_the_shares_of_unknown_words_stand_beside_another_domain(tmp_path: Path) -> None:
    """The run of all of train shares the experiment's token files, another domain has its own."""
    finished(tmp_path, "whole", 2000, 160.0, 140.0, 0.25)
    finished(tmp_path, "domain", 90, 400.0, 300.0, 0.6)
    tokens(tmp_path / "tokens", 45, 50)
    tokens(tmp_path / "domain", 123, 131)
    RunDir(tmp_path / "whole").metrics.write("reproduce", {PROCESSOR_SECONDS: 900.0})
    text = write_tables(tmp_path)
    shares = [line.rstrip("| ").rpartition("|")[2].strip() for line in text.splitlines()[2:4]]
    assert shares == ["4.5 / 5.0", "12.3 / 13.1"]
    domain, spent = rows(tmp_path)[-2:]
    assert domain.what == "another domain, its own datastore: LM → + kNN, valid; share of `<unk>` of valid / test"
    assert (domain.ours.text(), domain.verdict) == ("400.00 → 300.00; `<unk>` 12.3 / 13.1 %", "appears")
    assert (spent.what, spent.ours.text()) == ("processor time of 1 runs, user and system", "0.25 hours")


def test_what_is_tuned_on_another_split_is_none_that_can_be_compared(tmp_path: Path) -> None:
    finished(tmp_path, "whole", 2000, 160.0, 140.0, 0.25, tuned_on="test")
    with pytest.raises(NothingFinished):
        write_tables(tmp_path)


def test_parts_that_are_measured_on_less_text_are_refused(tmp_path: Path) -> None:
    finished(tmp_path, "whole", 2000, 160.0, 140.0, 0.25, words=900)
    finished(tmp_path, "words-950", 950, 160.0, 150.0, 0.25, words=900)
    # Of other words, and set beside none of them.
    finished(tmp_path, "domain", 90, 400.0, 300.0, 0.6, words=80)
    write_tables(tmp_path)
    finished(tmp_path, "words-500", 500, 160.0, 155.0, 0.25, words=500)
    with pytest.raises(DistlmError, match=r"words-500: has the perplexity of 500 tokens of valid.*fewer than 900"):
        write_tables(tmp_path)


def settings(text: Path, words: int, *more: str) -> dict[str, RunConfig]:
    given = [f"data.text_dir={text}", *more]
    part = [f"data.first_words={words}", "datastore.checkpoint=elsewhere", *given]
    own = {"whole": given, f"words-{words}": part}
    return {run: load_config("wikitext2-small", of_run) for run, of_run in own.items()}


@pytest.mark.parametrize(
    ("words", "more", "least"),
    [
        (29, (), 30),
        (30, (), None),
        (20, ("knn.splits=[valid]",), None),
        (19, ("knn.splits=[valid]",), 20),
        # All runs alike.
        (9, ("data.first_words=12",), None),
    ],
)
def test_parts_that_cut_valid_or_test_are_refused_before_anything_runs(
    words: int, more: tuple[str, ...], least: int | None, tmp_path: Path
) -> None:
    """10 lines of a word and its end in valid, 10 of two words in test."""
    for split, line in (("train", "a b c d\n"), ("valid", "a\n"), ("test", "a b\n")):
        (tmp_path / f"{split}.txt").write_text(10 * line, "utf-8")
    if least is None:
        check_settings(settings(tmp_path, words, *more))
        return
    with pytest.raises(UsageError, match=rf"words=\[{words}\]: .*valid has 20.*; give no fewer than {least}$"):
        check_settings(settings(tmp_path, words, *more))


def test_no_text_is_a_tag_where_markdown_is_shown(tmp_path: Path) -> None:
    finished(tmp_path, "whole", 2000, 160.0, 140.0, 0.25)
    finished(tmp_path, "domain", 90, 400.0, 300.0, 0.6)
    tokens(tmp_path / "domain", 123, 131)
    shown = [write_tables(tmp_path), *NOTES, *(f"{row.what} {row.ours.text()}" for row in rows(tmp_path))]
    assert sum("<unk>" in text for text in shown) == 3
    for text in shown:
        assert "<" not in re.sub(r"`[^`]*`", "", text)
