"""The tables of `distlm reproduce knnlm`, from results whose numbers are written here."""

import csv
import math
from pathlib import Path

import pytest
from msgspec import UNSET
from support.records.examples import example

from distlm.analysis.papers.knnlm import rows, write_tables
from distlm.analysis.tables import NothingFinished
from distlm.data.records import SplitFacts, TokensMeta
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.tune.records import Figures, Grid, Tuned
from distlm.runtime.metrics import PROCESSOR_SECONDS
from distlm.runtime.records import given
from distlm.runtime.rundir import RunDir


def finished(root: Path, run: str, keys: int, lm: float, knn: float, weight: float) -> None:
    results = example(Results)
    split = next(iter(results.splits.values()))
    split.lm, split.knn = Figures(math.log(lm), lm), Figures(math.log(knn), knn)
    results.splits = {"valid": split, "test": split}
    assert results.datastore
    results.datastore.rows = keys
    results.write(root / run / "results.json")
    tuned = example(Tuned)
    tuned.split, tuned.weight, tuned.temperature, tuned.k = "valid", weight, 4.0, 16
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
    assert domain.what == "another domain, its own datastore: LM → + kNN, valid; share of <unk> of valid / test"
    assert (domain.ours.text(), domain.verdict) == ("400.00 → 300.00; <unk> 12.3 / 13.1 %", "appears")
    assert (spent.what, spent.ours.text()) == ("processor time of 1 runs, user and system", "0.25 hours")
