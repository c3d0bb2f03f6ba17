"""The tables and figures of `distlm reproduce pkm-plm`, from results whose numbers are written here."""

from pathlib import Path
from typing import Any

import pytest
from support.pictures import description
from support.pkm_plm import USE, cells, evaluated, finetuned, labelled, lines_of

from distlm.analysis.papers import pkm_plm
from distlm.analysis.papers.pkm_plm import rows, write_tables
from distlm.runtime.rundir import RunDir
from distlm.training.records import LmResults, Staleness


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the bars are drawn of."""
    given: list[Any] = []
    bars = pkm_plm.grouped_bars

    def kept(panels: Any, caption: str) -> Any:
        given.append(panels)
        return bars(panels, caption)

    monkeypatch.setattr(pkm_plm, "grouped_bars", kept)
    return given


def test_each_run_is_shown_on_the_texts_it_was_evaluated_on(tmp_path: Path) -> None:
    """As when wikitext= was given later, with --only."""
    evaluated(tmp_path, "init", {"valid": 9.0, "test": 8.5, "wikitext": 28.25})
    evaluated(tmp_path, "pkm", {"valid": 12.0, "test": 11.5}, {"2": USE, "4": {**USE, "top1_mu": 0.5}})
    evaluated(tmp_path, "resm", {"valid": 10.0, "test": 9.5, "wikitext": 30.0}, {"2": {**USE, "mu": 1.0}})
    shown = write_tables(tmp_path)
    assert cells(tmp_path / "pretraining.md") == [
        ["model", "valid ppl", "test ppl", "wikitext ppl", "MU %", "top-1 MU %", "KL_u", "KL_w", "use on"],
        ["+Init (dense, as long again)", "9.00", "8.50", "28.25", "", "", "", "", ""],
        ["+PKM", "12.00", "11.50", "", "90.0 / 90.0", "25.0 / 50.0", "1.50 / 1.50", "2.25 / 2.25", "test"],
        ["+ResM", "10.00", "9.50", "30.00", "100.0", "25.0", "1.50", "2.25", "wikitext"],
    ]
    assert "Use of the memories of layers 2 on the text of the last column." in shown
    (pair,) = rows(tmp_path)
    # On the texts that both have: wikitext is not among pkm's.
    assert (pair.what, pair.ours.text(), pair.verdict) == ("+ResM (and +PKM): valid", "10.00 (12.00)", "appears")
    names = ("run", "layer", "wikitext", "top1_mu", "use_on")
    assert [[line[name] for name in names] for line in lines_of(tmp_path / "pretraining.csv")] == [
        ["init", "", "28.25", "", ""],
        ["pkm", "2", "", "0.25", "test"],
        ["pkm", "4", "", "0.5", "test"],
        ["resm", "2", "30.0", "0.25", "wikitext"],
    ]


def test_medians_beside_the_majority(tmp_path: Path) -> None:
    """Tables 4 and 5."""
    finetuned(tmp_path, "dense", "SST-2", [0.82, 0.80, 0.81])
    finetuned(tmp_path, "pkm", "SST-2", [0.85, 0.84, 0.86], "updated")
    finetuned(tmp_path, "pkm", "SST-2", [0.75, 0.74, 0.76], "frozen")
    finetuned(tmp_path, "pkm", "MRPC", [0.70, 0.71, 0.72], "frozen")
    shown = write_tables(tmp_path)
    assert cells(tmp_path / "finetuning.md") == [
        ["model", "memory", "SST-2 (accuracy)", "MRPC (accuracy)"],
        ["majority", "", "50.9", "68.4"],
        ["dense", "", "81.0", ""],
        ["+PKM", "frozen", "75.0", "71.0"],
        ["+PKM", "updated", "85.0", ""],
    ]
    assert (tmp_path / "finetuning.md").read_text("utf-8").strip() in shown
    found = lines_of(tmp_path / "finetuning.csv")
    assert len(found) == 12
    assert found[-1] == {
        "run": "pkm", "name": "SST-2", "memory": "updated", "task": "SST-2", "seed": "3", "metric": "accuracy",
        "dev": "0.86", "majority": "0.509",
    }  # fmt: skip
    # Of models without memory there is no use to show.
    assert not (tmp_path / "usage.md").exists() and not (tmp_path / "classes.csv").exists()


def test_every_task_that_is_done_has_a_column(tmp_path: Path) -> None:
    """Table 4 has both dev sets of MNLI, and the exact match and F1 of SQuAD."""
    for task in ("SQuAD", "RTE", "QNLI", "MNLI"):
        finetuned(tmp_path, "pkm", task, [0.8] * 3, "updated")
    write_tables(tmp_path)
    assert cells(tmp_path / "finetuning.md") == [
        ["model", "memory", "MNLI (accuracy / accuracy_mismatched)", "QNLI (accuracy)", "RTE (accuracy)",
         "SQuAD (exact_match / f1)"],
        ["majority", "", "35.4 / 35.2", "50.5", "52.7", "0.5 / 1.0"],
        ["+PKM", "updated", "80.0 / 70.0", "80.0", "80.0", "70.0 / 80.0"],
    ]  # fmt: skip
    tasks = {line["task"]: line["metric"] for line in lines_of(tmp_path / "finetuning.csv")}
    assert tasks == {"MNLI": "accuracy", "QNLI": "accuracy", "RTE": "accuracy", "SQuAD": "f1"}


def test_two_fine_tunings_on_one_task_are_told_apart_by_name(tmp_path: Path, drawn: list[Any]) -> None:
    for name, value, kl in (("", 0.8, 0.5), ("sst-slow", 0.9, 0.75)):
        use = {"2": {"before": labelled(0.25, 0.5), "after": labelled(kl, 0.125)}}
        finetuned(tmp_path, "pkm", "SST-2", [value] * 3, "updated", name, use=use)
    write_tables(tmp_path)
    assert cells(tmp_path / "finetuning.md")[2:] == [
        ["+PKM", "updated", "80.0"],
        ["+PKM (sst-slow)", "updated", "90.0"],
    ]
    assert [line["name"] for line in lines_of(tmp_path / "finetuning.csv")] == ["SST-2"] * 3 + ["sst-slow"] * 3
    assert [row[0] for row in cells(tmp_path / "usage.md")[1:]] == ["+PKM", "+PKM (sst-slow)"]
    assert [line["name"] for line in lines_of(tmp_path / "usage.csv")] == ["SST-2", "sst-slow"]
    assert list(drawn[0]["IOU of the labels' use"]) == ["+PKM\nlayer 2", "+PKM (sst-slow)\nlayer 2"]


def test_use_of_the_memories_after_fine_tuning(tmp_path: Path) -> None:
    """Table 6 is of updated values; the frozen ones are in the CSV."""
    after = {"mu": 0.5, "top1_mu": 0.125, "kl_u": 2.5, "kl_w": None, "gini": 0.75}
    use = {"2": {"before": USE, "after": after}, "4": {"before": USE, "after": USE}}
    finetuned(tmp_path, "resm", "MRPC", [0.7] * 3, "updated", use=use)
    finetuned(tmp_path, "resm", "MRPC", [0.7] * 3, "frozen", use=use)
    shown = write_tables(tmp_path)
    assert cells(tmp_path / "usage.md") == [
        ["model", "task", "layer", "MU %", "top-1 MU %", "KL_u", "KL_w"],
        ["+ResM", "MRPC", "2", "50.0", "12.5", "2.50", ""],
        ["+ResM", "MRPC", "4", "90.0", "25.0", "1.50", "2.25"],
    ]
    assert (tmp_path / "usage.md").read_text("utf-8").strip() in shown
    found = lines_of(tmp_path / "usage.csv")
    assert [(line["memory"], line["layer"]) for line in found] == [
        ("updated", "2"), ("updated", "4"), ("frozen", "2"), ("frozen", "4"),
    ]  # fmt: skip
    assert found[0] == {
        "run": "resm", "name": "MRPC", "memory": "updated", "task": "MRPC", "layer": "2", "mu": "0.5",
        "top1_mu": "0.125", "kl_u": "2.5", "kl_w": "",
    }  # fmt: skip


def test_labels_before_and_after(tmp_path: Path, drawn: list[Any]) -> None:
    """Figure 4: KL and IOU of SST-2's labels with updated values; a measure that has no value has no bar."""
    use = {"2": {"before": labelled(None, 0.5), "after": labelled(0.75, 0.25)}}
    finetuned(tmp_path, "pkm", "SST-2", [0.8] * 3, "updated", use=use)
    finetuned(tmp_path, "pkm", "SST-2", [0.8] * 3, "frozen", use=use)
    finetuned(tmp_path, "pkm", "MRPC", [0.8] * 3, "updated", use=use)
    write_tables(tmp_path)
    told = {"run": "pkm", "name": "SST-2", "layer": "2"}
    assert lines_of(tmp_path / "classes.csv") == [
        {**told, "measure": "kl", "before": "", "after": "0.75"},
        {**told, "measure": "iou", "before": "0.5", "after": "0.25"},
    ]
    assert drawn == [
        {
            "KL of the labels' use, nats": {"+PKM\nlayer 2": {"before": None, "after": 0.75}},
            "IOU of the labels' use": {"+PKM\nlayer 2": {"before": 0.5, "after": 0.25}},
        }
    ]
    # KL has a value on one side only.
    assert description(tmp_path / "classes.png") == "With fine-tuning IOU of the labels' use rises in 0 of 1 memories."


def test_use_from_a_dense_model_and_from_nothing(tmp_path: Path) -> None:
    evaluated(tmp_path, "pkm", {"valid": 12.0}, {"2": USE, "4": USE})
    evaluated(tmp_path, "init-pkm", {"valid": 9.0}, {"2": {**USE, "top1_mu": 0.75}, "4": {**USE, "top1_mu": 0.5}})
    write_tables(tmp_path)
    (use,) = rows(tmp_path)
    assert use.ours.text() == "75.0 / 50.0 % (25.0 / 25.0 %)" and use.verdict == "appears"


def test_curves_and_unread_slots_say_what_there_is_to_see(tmp_path: Path) -> None:
    for run, losses, never in (("init", (3.0, 2.0), 0), ("pkm", (3.0, 2.5), 5)):
        evaluated(tmp_path, run, {"valid": 9.0})
        found = LmResults.read(tmp_path / run / "lm.json")
        found.staleness = {"2": Staleness(edges=[0, 10], slots=[never, 15])}
        found.write(tmp_path / run / "lm.json")
        for step, loss in enumerate(losses, 1):
            RunDir(tmp_path / run).metrics.write("train", {"valid/loss": loss}, step=step)
    write_tables(tmp_path)
    ends = "lowest for +Init (dense, as long again) (7.39) and highest for +PKM (12.18)"
    assert description(tmp_path / "curve.png") == f"Perplexity on valid ends {ends}."
    never_read = "Slots that were never read first: at most 25.0% (+PKM, layer 2)."
    assert description(tmp_path / "staleness.png") == never_read
    found = LmResults.read(tmp_path / "pkm" / "lm.json")
    found.staleness = {"2": Staleness(edges=[0, 10], slots=[0, 20])}
    found.write(tmp_path / "pkm" / "lm.json")
    write_tables(tmp_path)
    assert description(tmp_path / "staleness.png").startswith("Every slot of every memory was read first")
