"""The files of GLUE's tasks, and the same examples from the `datasets` library."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from distlm.errors import DistlmError
from distlm.finetune.tasks.glue import TASKS, read_glue
from distlm.finetune.tasks.unlabelled import read_glue_tests
from distlm.models.plm.config import FinetuneConfig

# Header, then rows: as the benchmark has them.
FILES: dict[str, tuple[str, list[str]]] = {
    "CoLA": ("", ["gj04\t1\t\tOne \"more.", "gj04\t0\t*\tOne the."]),
    "SST-2": ("sentence\tlabel", ["good film \t1", "\" bad \t0"]),
    "MRPC": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", ["1\t7\t8\tHe \"said .\tShe said .", "0\t7\t9\ta\tb"],
    ),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tg\tf\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000", "1\tg\tf\t2012\t4\tnone\tnone\ta\tb\t3.8"],
    ),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", ["1\t2\t3\ta?\tb?\t0", "4\t5\t6\tc?\td?\t1"]),
    "QNLI": ("index\tquestion\tsentence\tlabel", ["0\tq?\ts.\tentailment", "1\tq?\tt.\tnot_entailment"]),
    "RTE": ("index\tsentence1\tsentence2\tlabel", ["0\ta.\tb.\tnot_entailment", "1\tc.\td.\tentailment"]),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", ["0\ta.\tb.\t1", "1\tc.\td.\t0"]),
}  # fmt: skip
MNLI = "index\tpromptID\tpairID\tgenre\tp1\tp2\tp3\tp4\tsentence1\tsentence2\tlabel1\t{}gold_label"
EXPECTED = {
    "CoLA": (["One \"more.", "One the."], None, [1, 0]),
    "SST-2": (["good film ", "\" bad "], None, [1, 0]),
    "MRPC": (["He \"said .", "a"], ["She said .", "b"], [1, 0]),
    "STS-B": (["A plane.", "a"], ["An air plane.", "b"], [5.0, 3.8]),
    "QQP": (["a?", "c?"], ["b?", "d?"], [0, 1]),
    "QNLI": (["q?", "q?"], ["s.", "t."], [0, 1]),
    "RTE": (["a.", "c."], ["b.", "d."], [1, 0]),
    "WNLI": (["a.", "c."], ["b.", "d."], [1, 0]),
}  # fmt: skip


def write(folder: Path, task: str, header: str, rows: list[str], names: tuple[str, ...] = ("train", "dev")) -> Path:
    (folder / task).mkdir(parents=True, exist_ok=True)
    for name in names:
        # The last line has no newline, as in the benchmark's files.
        (folder / task / f"{name}.tsv").write_text("\n".join([header, *rows] if header else rows), "utf-8")
    return folder


def config(task: str, folder: Path) -> FinetuneConfig:
    return FinetuneConfig(task=task, data_dir=str(folder))  # type: ignore[arg-type]


@pytest.mark.parametrize("task", FILES)
def test_every_task_is_read_as_the_benchmark_has_it(task: str, tmp_path: Path) -> None:
    write(tmp_path, task, *FILES[task])
    splits = read_glue(TASKS[task], config(task, tmp_path))
    first, second, labels = EXPECTED[task]
    for split in ("train", "dev"):
        assert (splits[split].first, splits[split].second) == (first, second)
        assert splits[split].labels.tolist() == labels
    # The task's own folder does as well.
    assert read_glue(TASKS[task], config(task, tmp_path / task))["dev"].first == first


def test_mnli_has_two_dev_sets_with_other_columns_than_train(tmp_path: Path) -> None:
    row = "0\t1\t2\tfiction\t(\t(\t(\t(\tA {}.\tB.\tneutral\t{}{}"
    write(tmp_path, "MNLI", MNLI.format(""), [row.format("t", "", "neutral")], ("train",))
    more = "label2\tlabel3\tlabel4\tlabel5\t"
    for name in ("matched", "mismatched"):
        line = row.format(name, "neutral\t" * 4, "contradiction")
        write(tmp_path, "MNLI", MNLI.format(more), [line], (f"dev_{name}",))
    splits = read_glue(TASKS["MNLI"], config("MNLI", tmp_path))
    assert {name: (found.first, found.labels.tolist()) for name, found in splits.items()} == {
        "train": (["A t."], [1]), "dev_matched": (["A matched."], [2]), "dev_mismatched": (["A mismatched."], [2]),
    }  # fmt: skip


def test_windows_line_ends_and_all_of_a_line(tmp_path: Path) -> None:
    write(tmp_path, "SST-2", "sentence\tlabel\r", ["a\u2028b\x85 c\t1\r", "d\t0\r"])
    assert read_glue(TASKS["SST-2"], config("SST-2", tmp_path))["train"].first == ["a\u2028b\x85 c", "d"]


def test_incomplete_rows_of_qqp_are_left_out_and_of_others_refused(tmp_path: Path) -> None:
    header, rows = FILES["QQP"]
    write(tmp_path, "QQP", header, [rows[0], "9\t10\t11\tcut", rows[1]])
    assert read_glue(TASKS["QQP"], config("QQP", tmp_path))["train"].labels.tolist() == [0, 1]
    header, rows = FILES["RTE"]
    write(tmp_path, "RTE", header, [rows[0], "1\tcut"])
    with pytest.raises(DistlmError, match=r"train\.tsv, line 3: 2 columns, RTE has 4"):
        read_glue(TASKS["RTE"], config("RTE", tmp_path))


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("sentence\tlabel", ["a\t1", "b\t2"], r"train\.tsv, line 3: the label is '2', SST-2 has one of 0, 1"),
        ("sentence\tlabel", ["a\tentailment"], r"line 2: the label is 'entailment'"),
        ("index\tsentence", ["0\ta"], r"no column 'label' in its first line \(index, sentence\)"),
        ("sentence\tlabel", [], r"train\.tsv: no examples"),
    ],
)
def test_wrong_files_are_refused(header: str, rows: list[str], message: str, tmp_path: Path) -> None:
    write(tmp_path, "SST-2", header, rows)
    with pytest.raises(DistlmError, match=message):
        read_glue(TASKS["SST-2"], config("SST-2", tmp_path))


def test_scores_outside_the_scale_and_headers_in_cola_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "STS-B", "sentence1\tsentence2\tscore", ["a\tb\t5.5"])
    with pytest.raises(DistlmError, match=r"the label is '5\.5', STS-B has a number from 0 to 5"):
        read_glue(TASKS["STS-B"], config("STS-B", tmp_path))
    write(tmp_path, "CoLA", "index\tsentence", ["0\tA test set."])
    with pytest.raises(DistlmError, match=r"train\.tsv, line 1: 2 columns, CoLA has 4"):
        read_glue(TASKS["CoLA"], config("CoLA", tmp_path))


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=r"finetune\.data_dir is empty"):
        read_glue(TASKS["RTE"], FinetuneConfig(task="RTE"))
    with pytest.raises(DistlmError, match=r"no MNLI/train\.tsv in it; MNLI needs train\.tsv, dev_matched\.tsv"):
        read_glue(TASKS["MNLI"], config("MNLI", tmp_path))


def test_the_datasets_library_gives_the_same_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the hub extra is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    header, rows = FILES["RTE"]
    write(tmp_path, "RTE", header, rows)
    from_files = read_glue(TASKS["RTE"], config("RTE", tmp_path))
    folder = tmp_path / "local"
    folder.mkdir()
    found = from_files["train"]
    for split in ("train", "validation"):
        examples = zip(found.first, found.second or [], found.labels.tolist(), strict=True)
        lines = [{"sentence1": one, "sentence2": two, "label": label, "idx": 0} for one, two, label in examples]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    given = FinetuneConfig(task="RTE", source="hub", hub_name=str(folder))
    splits = read_glue(TASKS["RTE"], given)
    for split in ("train", "dev"):
        assert splits[split].first == from_files[split].first and splits[split].second == from_files[split].second
        assert np.array_equal(splits[split].labels, from_files[split].labels)
    with pytest.raises(DistlmError, match=r"validation_matched: no such split for finetune\.task=MNLI"):
        read_glue(TASKS["MNLI"], FinetuneConfig(task="MNLI", source="hub", hub_name=str(folder)))
    with pytest.raises(DistlmError, match=r"no column question; it has sentence1"):
        read_glue(TASKS["QNLI"], FinetuneConfig(task="QNLI", source="hub", hub_name=str(folder)))


@pytest.mark.data
@pytest.mark.parametrize(
    ("task", "train", "dev", "test", "positive"),
    [
        ("CoLA", 8551, 1043, 1063, None),
        ("SST-2", 67349, 872, 1821, None),
        ("MRPC", 3668, 408, 1725, (2474, 279)),
        ("RTE", 2490, 277, 3000, None),
    ],
)
def test_published_counts(task: str, train: int, dev: int, test: int, positive: tuple[int, int] | None) -> None:
    folder = Path(os.environ.get("DISTLM_TEST_DATA", "")) / "glue"
    if not (folder / task).is_dir():
        pytest.skip(f"no GLUE files: set DISTLM_TEST_DATA to a folder that holds glue/{task}/train.tsv")
    splits = read_glue(TASKS[task], config(task, folder))
    assert (len(splits["train"]), len(splits["dev"])) == (train, dev)
    # The benchmark counts what is to be predicted from 0.
    assert read_glue_tests(TASKS[task], config(task, folder))["test"].ids == [str(row) for row in range(test)]
    if positive:
        assert (splits["train"].labels.sum(), splits["dev"].labels.sum()) == positive
