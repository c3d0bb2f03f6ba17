"""Tables of the scale `scarce`: slots × reads, the models over their seeds, staleness, processor time; from results
whose numbers are written here."""

from pathlib import Path
from typing import Any

import pytest
from support.pkm_plm import USE, cells, evaluated, finetuned, labelled, lines_of

from distlm.analysis.papers.pkm_plm import rows, write_tables
from distlm.analysis.results.records import Figure, ResultRow
from distlm.config.load import dump_config, load_config
from distlm.reproduce.results import REPRODUCE
from distlm.runtime.metrics import PROCESSOR_SECONDS
from distlm.runtime.rundir import RunDir
from distlm.training.records import LmResults, Staleness

TOP1 = {"pkm": (0.3, 0.34), "resm": (0.31, 0.35), "init-pkm": (0.6, 0.62), "init-resm": (0.7, 0.72)}
"""Of both seeds, in layer 2; in layer 3 .1 more."""


def used(root: Path, run: str, top1: float, heads: int = 4, read_last: int = 10, **more: Any) -> None:
    """An evaluated run with memories of 64² slots at layers 2 and 3, and its settings."""
    perplexities = {"valid": 80.0, "wikitext": 300.0 - 100 * top1}
    layers = {"2": {**USE, "top1_mu": top1}, "3": {**USE, "top1_mu": round(top1 + 0.1, 6)}}
    evaluated(root, run, perplexities, layers)
    found = LmResults.read(root / run / "lm.json")
    for text, tokens in (("valid", 512), ("wikitext", 4096)):
        found.splits[text].text_tokens = tokens
    slots = [10 - read_last, 0, read_last]
    found.staleness = {"2": Staleness(edges=[0, 5, 10], slots=slots, written=[0, 0, 10])}
    found.write(root / run / "lm.json")
    settings = [f"memory.heads={heads}", *(f"{key}={value}" for key, value in more.items())]
    config = load_config("plm-small-pkm", [f"run_dir={root / run}", *settings])
    (root / run / "config.yaml").write_text(dump_config(config), "utf-8")


@pytest.fixture
def scarce(tmp_path: Path) -> Path:
    for model, seeds in TOP1.items():
        for run, top1, last in zip((model, f"{model}-seed2"), seeds, (4 if model == "pkm" else 8, 5), strict=True):
            used(tmp_path, run, top1, read_last=last)
    return tmp_path


def found_rows(root: Path) -> dict[str, ResultRow]:
    return {row.what: row for row in rows(root)}


def test_a_finding_appears_by_t_in_every_layer(scarce: Path) -> None:
    """PKM .30 and .34, that is .32 ± .02; Init+ResM .71 ± .01: .39 / √(.02² + .01²) = 17.4 standard errors;
    with 1.5 degrees of freedom t is 6.2."""
    shown = write_tables(scarce)
    found = found_rows(scarce)
    words = "top-1 MU on wikitext (4.00 first reads a slot), layer by layer, of {} (and {})"
    both = found[words.format("+Init +ResM", "+PKM")]
    assert both.ours.text() == (
        "71.00 ± 1.00 / 81.00 ± 1.00 % (32.00 ± 2.00 / 42.00 ± 2.00 %); +17.4 / +17.4 standard errors apart"
    )
    assert isinstance(both.paper, Figure) and both.paper.text() == "98.2 / 97.3 % (2.2 / 84.1 %)"
    assert both.verdict == "appears"
    # .33 ± .02 and .32 ± .02.
    assert found[words.format("+ResM", "+PKM")].verdict == "cannot be said"
    # Both seeds have the same KL.
    same = found["KL_u on wikitext (4.00 first reads a slot), layer by layer, of +ResM (and +PKM)"]
    assert same.verdict == "cannot be said" and "apart" not in same.ours.text()
    # 4 and 5 of 10 slots, beside 8 and 5: .45 ± .05 and .65 ± .15.
    stale = found["read first in the last fifth, layer by layer, of +Init +PKM (and +PKM)"]
    assert stale.ours.text() == "65.00 ± 15.00 % (45.00 ± 5.00 %); +1.3 standard errors apart"
    assert stale.verdict == "cannot be said"
    # Over the seeds, too: 300 − 33 and 300 − 32, ± 2; by seed each is 1 lower.
    better = found["+ResM (and +PKM): valid, wikitext"]
    assert better.ours.text() == (
        "80.00 ± 0.00, 267.00 ± 2.00 (80.00 ± 0.00, 268.00 ± 2.00); seed by seed +0.00 ± 0.00, -1.00 ± 0.00"
    )
    # Equal on valid and lower on the other text: no worse.
    assert better.finding == "ResM is no worse than PKM" and better.verdict == "appears"
    assert both.ours.text() in shown and "**cannot be said**" in (scarce / "findings.md").read_text("utf-8")


def test_what_is_worse_does_not_appear(tmp_path: Path) -> None:
    for run, top1 in (("pkm", 0.6), ("pkm-seed2", 0.62), ("resm", 0.4), ("resm-seed2", 0.42)):
        used(tmp_path, run, top1)
    write_tables(tmp_path)
    (row,) = (row for row in rows(tmp_path) if row.finding == "ResM is used better than PKM")
    assert row.verdict == "does not appear"


def test_perplexities_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Masked tokens follow the seed, and seeds are 30 apart; the third one is of the second model alone."""
    for run, value in (
        ("init-pkm", 100.0), ("init-pkm-seed2", 130.0), ("init-pkm-seed3", 10.0),
        ("init-resm", 99.0), ("init-resm-seed2", 128.9), ("resm", 100.0), ("pkm", 100.0),
    ):  # fmt: skip
        evaluated(tmp_path, run, {"valid": value})
    write_tables(tmp_path)
    found = found_rows(tmp_path)
    both = found["+Init +ResM (and +Init +PKM): valid"]
    assert both.ours.text() == "113.95 ± 14.95 (115.00 ± 15.00); seed by seed -1.05 ± 0.05"
    assert (both.finding, both.verdict) == ("ResM is better than PKM", "appears")
    # Of one seed: equal is no worse.
    assert found["+ResM (and +PKM): valid"].verdict == "appears"


@pytest.mark.parametrize(
    ("resm", "verdict"), [(100.0, "appears"), (101.5, "cannot be said"), (102.5, "does not appear")]
)
def test_of_one_seed_the_margin_stands_for_the_interval(tmp_path: Path, resm: float, verdict: str) -> None:
    for run, value in (("pkm", 100.0), ("resm", resm)):
        evaluated(tmp_path, run, {"valid": value})
    write_tables(tmp_path)
    assert found_rows(tmp_path)["+ResM (and +PKM): valid"].verdict == verdict


def test_the_means_over_the_seeds(scarce: Path) -> None:
    write_tables(scarce)
    head, pkm, *_ = cells(scarce / "seeds.md")
    of_pkm = dict(zip(head, pkm, strict=True))
    assert (of_pkm["model"], of_pkm["seeds"]) == ("+PKM", "2")
    assert of_pkm["wikitext perplexity"] == "268.00 ± 2.00"
    assert of_pkm["top-1 MU %"] == "32.00 ± 2.00 / 42.00 ± 2.00"
    assert of_pkm["read first in the last fifth %"] == "45.00 ± 5.00"
    assert of_pkm["written in the last fifth %"] == "100.00 ± 0.00"
    (line,) = (
        line for line in lines_of(scarce / "seeds.csv")
        if (line["model"], line["measure"], line["layer"]) == ("init-resm", "top-1 MU", "3")
    )  # fmt: skip
    assert line["seeds"] == "2" and float(line["mean"]) == pytest.approx(81) and float(
        line["standard_error"]) == pytest.approx(1)  # fmt: skip
    # Each run by itself, in the paper's tables, too.
    assert "+Init +ResM, seed 2" in (scarce / "pretraining.md").read_text("utf-8")


def test_one_seed_has_no_table_over_seeds(tmp_path: Path) -> None:
    used(tmp_path, "pkm", 0.5)
    write_tables(tmp_path)
    assert not (tmp_path / "seeds.md").exists() and not (tmp_path / "seeds.csv").exists()


def test_use_after_fine_tuning_over_the_seeds(scarce: Path) -> None:
    """Table 6 and figure 4: of SST-2, with updated values; a fine-tuning with a name of its own is left out."""
    for run, top1, kl in (
        ("pkm", 0.2, 0.5), ("pkm-seed2", 0.22, 0.52), ("init-resm", 0.1, 0.8), ("init-resm-seed2", 0.12, 0.82),
    ):  # fmt: skip
        same = {"before": labelled(0.1, 0.5), "after": labelled(0.1, 0.5)}
        use = {"2": {**same, "after": {**labelled(kl, 0.25), "top1_mu": top1}}}
        finetuned(scarce, run, "SST-2", [0.7] * 3, "updated", use=use)
        finetuned(scarce, run, "SST-2", [0.7] * 3, "updated", "other", use={"2": same})
        finetuned(scarce, run, "SST-2", [0.7] * 3, "frozen", use={"2": same})
    write_tables(scarce)
    found = found_rows(scarce)
    first = found["SST-2 top-1 MU, layer by layer, of +Init +ResM (and +PKM)"]
    assert first.ours.text() == "11.00 ± 1.00 % (21.00 ± 1.00 %); -7.1 standard errors apart"
    assert first.verdict == "does not appear"
    assert found["SST-2 KL, layer by layer, of +Init +ResM (and +PKM)"].verdict == "appears"
    assert found["SST-2 IOU, layer by layer, of +Init +ResM (and +PKM)"].verdict == "cannot be said"


def test_slots_by_reads(tmp_path: Path) -> None:
    """512 and 4,096 tokens, one or four heads, 64² or 128² slots."""
    for name, heads, sub_keys, top1 in (("n64-h4-k16", 4, 64, 0.9), ("n128-h1-k16", 1, 128, 0.2)):
        used(tmp_path, f"sweep-{name}", top1, heads, **{"memory.sub_keys": sub_keys})
    # Not finished yet.
    (tmp_path / "sweep-n256-h1-k16").mkdir()
    shown = write_tables(tmp_path)
    assert cells(tmp_path / "sweep.md") == [
        ["slots", "heads", "k", "text", "first reads a slot", "top-1 MU %", "MU %", "KL_u", "ppl"],
        ["4,096", "4", "16", "valid", "0.50", "90.0 / 100.0", "90.0 / 90.0", "1.50 / 1.50", "80.0"],
        ["4,096", "4", "16", "wikitext", "4.00", "90.0 / 100.0", "90.0 / 90.0", "1.50 / 1.50", "210.0"],
        ["16,384", "1", "16", "valid", "0.03", "20.0 / 30.0", "90.0 / 90.0", "1.50 / 1.50", "80.0"],
        ["16,384", "1", "16", "wikitext", "0.25", "20.0 / 30.0", "90.0 / 90.0", "1.50 / 1.50", "280.0"],
    ]
    assert "PKM after 600 updates, layer by layer." in shown
    assert [row.ours.text() for row in rows(tmp_path)] == [
        "90.0 / 100.0 % at 4.00 first reads a slot", "20.0 / 30.0 % at 0.25 first reads a slot",
    ]  # fmt: skip


def test_when_slots_were_read_first_and_written(scarce: Path) -> None:
    write_tables(scarce)
    head, *lines = cells(scarce / "staleness.md")
    assert head == ["memory", "slots last", "never", "up to 5", "up to 10"]
    assert lines[:2] == [
        ["+PKM, layer 2", "read first", "60.0", "0.0", "40.0"], ["+PKM, layer 2", "written", "0.0", "0.0", "100.0"],
    ]  # fmt: skip


def test_a_run_of_an_older_version_has_its_tables(tmp_path: Path) -> None:
    """Without the tokens of its texts and when slots were written; nor are its settings recorded."""
    evaluated(tmp_path, "pkm", {"valid": 12.0}, {"2": USE})
    found = LmResults.read(tmp_path / "pkm" / "lm.json")
    found.staleness = {"2": Staleness(edges=[0, 10], slots=[1, 3])}
    found.write(tmp_path / "pkm" / "lm.json")
    write_tables(tmp_path)
    assert lines_of(tmp_path / "pretraining.csv")[0]["reads_a_slot"] == ""
    assert [line[1] for line in cells(tmp_path / "staleness.md")[1:]] == ["read first"]
    assert not (tmp_path / "processor.csv").exists()


def test_processor_time_of_all_starts(tmp_path: Path) -> None:
    for run in ("pkm", "rows"):
        (tmp_path / run).mkdir()
        for seconds in (900.0, 1800.0):
            RunDir(tmp_path / run).metrics.write(REPRODUCE, {PROCESSOR_SECONDS: seconds})
    evaluated(tmp_path, "pkm", {"valid": 12.0})
    write_tables(tmp_path)
    assert [[*line.values()] for line in lines_of(tmp_path / "processor.csv")] == [
        ["pkm", "2700.0"],
        ["rows", "2700.0"],
    ]
    (row,) = rows(tmp_path)
    assert (row.what, row.ours.text()) == ("processor time of 2 runs, user and system", "1.50 hours")
