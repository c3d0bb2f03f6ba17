"""Predictions: the benchmarks' own files, in the order of the source, whole or absent; test sets without labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.finetune import finetune_config, hugging_face, run, vocabulary, write_sst2, write_test

from distlm.errors import DistlmError
from distlm.finetune.data import Outputs, TaskData, open_task
from distlm.finetune.predictions import predicted_parts, write_all
from distlm.finetune.records import PredictionFiles
from distlm.finetune.source import Source
from distlm.finetune.tasks.glue import TASKS
from distlm.finetune.tasks.unlabelled import read_glue_tests
from distlm.models.complete import check_files
from distlm.models.plm.config import FinetuneConfig

# Task → columns and rows of dev, columns and rows of test as the benchmark has them, what two rows of test are told.
TABLES: dict[str, tuple[str, list[str], str, list[str], list[str]]] = {
    "CoLA": ("", ["gj04\t1\t\tgood1", "gj04\t0\t*\tbad1"], "index\tsentence", ["0\tgood1", "1\tbad1"], ["1", "0"]),
    "SST-2": ("sentence\tlabel", ["good1 \t1"], "index\tsentence", ["0\tgood1", "1\t\"bad1"], ["1", "0"]),
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", ["1\t7\t8\ta\tb"],
        "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String", ["0\t7\t8\ta\tb", "1\t8\t9\ta\tb"], ["1", "0"],
    ),
    "STS-B": (
        "index\tsentence1\tsentence2\tscore", ["0\ta\tb\t5.000", "1\ta\tb\t1.0"],
        "index\tsentence1\tsentence2", ["0\ta\tb", "1\tb\ta"], ["0.250", "2.000"],
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", ["5\t2\t3\ta?\tb?\t0"],
        "id\tquestion1\tquestion2", ["0\ta?\tb?", "1\tb?\tb?"], ["1", "0"],
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel", ["0\tq?\ts.\tentailment"],
        "index\tquestion\tsentence", ["0\tq?\ts.", "1\tr?\ts."], ["not_entailment", "entailment"],
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel", ["0\ta.\tb.\tentailment"],
        "index\tsentence1\tsentence2", ["7\ta.\tb.", "3\tb.\tb."], ["not_entailment", "entailment"],
    ),
    "WNLI": (
        "index\tsentence1\tsentence2\tlabel", ["0\ta.\tb.\t1"],
        "index\tsentence1\tsentence2", ["0\ta.\tb.", "1\tb.\tb."], ["1", "0"],
    ),
}  # fmt: skip


def table(folder: Path, name: str, header: str, rows: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.tsv").write_text("\n".join([header, *rows] if header else rows), "utf-8")


def opened(folder: Path, data: Path, task: str, **settings: Any) -> TaskData:
    """The task with the tiny vocabulary."""
    tokenizer = vocabulary(folder / "tokenizer").tokenizer()
    backbone = {"model_type": "bert", "max_position_embeddings": 64}
    source = Source("s", None, backbone, {}, 1, 9, {}, tokenizer, "h", 0, "f")
    given = {"length": 32, **settings}
    config = FinetuneConfig(task=task, data_dir=str(data), **given)  # type: ignore[arg-type]
    return open_task(config.with_defaults(), source)


def numbers(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


@pytest.mark.parametrize("task", TABLES)
def test_glue_gets_its_submission_files(task: str, tmp_path: Path) -> None:
    header, dev, test_header, test, wanted = TABLES[task]
    for split in ("train", "dev"):
        table(tmp_path / "glue" / task, split, header, dev)
    table(tmp_path / "glue" / task, "test", test_header, test)
    data = opened(tmp_path, tmp_path / "glue", task)
    found = numbers([0.25], [2.0]) if task == "STS-B" else numbers([-1, 2], [3, -4])
    # Of dev as many rows as there are.
    outputs: Outputs = {"dev": np.repeat(found[:1], len(dev), 0), "test": found}
    write_all(tmp_path / "out", data, outputs, "m")
    place = tmp_path / "out" / "predictions" / "test"
    ids = [row.split("\t")[0] for row in test]
    lines = [f"{name}\t{answer}" for name, answer in zip(ids, wanted, strict=True)]
    assert (place / f"{task}.tsv").read_text("utf-8") == "\n".join(["index\tprediction", *lines]) + "\n"
    assert np.load(place / f"{task}.ids.npy").tolist() == ids
    assert np.array_equal(np.load(place / f"{task}.logits.npy"), found)
    (first, *_) = (tmp_path / "out" / "predictions" / "dev" / f"{task}.tsv").read_text("utf-8").splitlines()[1:]
    assert first == f"0\t{wanted[0]}" and data.missing == ()
    manifest = PredictionFiles.read(place / "manifest.json")
    assert manifest.rows == {"test": 2} and sorted(check_files(place, "", marker=PredictionFiles)) == [
        f"{task}.{end}" for end in ("ids.npy", "logits.npy", "tsv")
    ]


@pytest.mark.parametrize("place", ["diagnostic/diagnostic.tsv", "AX/AX.tsv", ""])
def test_mnli_has_a_file_for_each_of_its_sets(place: str, tmp_path: Path) -> None:
    pair, label = "index\tsentence1\tsentence2", "neutral"
    for split in ("train", "dev_matched", "dev_mismatched"):
        table(tmp_path / "MNLI", split, f"{pair}\tgold_label", [f"0\ta\tb\t{label}"])
    for split in ("test_matched", "test_mismatched"):
        table(tmp_path / "MNLI", split, pair, ["9847\ta\tb"])
    if place:
        table((tmp_path / place).parent, Path(place).stem, pair, ["0\tb\ta"])
    data = opened(tmp_path, tmp_path, "MNLI")
    assert data.missing == (() if place else ("diagnostic",))
    write_all(tmp_path, data, {name: numbers([0, 0, 1]) for name in (*data.dev, *data.test)}, "m")
    names = {path.name for path in (tmp_path / "predictions" / "test").glob("*.tsv")}
    assert names == {"MNLI-m.tsv", "MNLI-mm.tsv", *(["AX.tsv"] if place else [])}
    text = (tmp_path / "predictions" / "test" / "MNLI-mm.tsv").read_text("utf-8")
    assert text == "index\tprediction\n9847\tcontradiction\n"
    assert {path.name for path in (tmp_path / "predictions" / "dev").glob("*.tsv")} == {"MNLI-m.tsv", "MNLI-mm.tsv"}


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("index\tquestion", ["0\ta"], r"test\.tsv: no column 'sentence1' in its first line"),
        ("index\tsentence1\tsentence2", ["0\ta"], r"test\.tsv, line 2: 2 columns, the first line names 3"),
        ("index\tsentence1\tsentence2", [], r"test\.tsv: no examples"),
        ("index\tsentence1\tsentence2", ["0\ta\tb", "0\tc\td"], r"test\.tsv, line 3: the id 0 again"),
    ],
)
def test_wrong_test_sets_are_refused(header: str, rows: list[str], message: str, tmp_path: Path) -> None:
    table(tmp_path / "RTE", "test", header, rows)
    with pytest.raises(DistlmError, match=message):
        read_glue_tests(TASKS["RTE"], FinetuneConfig(task="RTE", data_dir=str(tmp_path)))


def test_the_datasets_library_gives_a_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the hub extra is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "local"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"sentence1": "a", "sentence2": f"b{i}", "label": -1, "idx": 5 + i} for i in range(2)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    config = FinetuneConfig(task="RTE", source="hub", hub_name=str(folder))
    found = read_glue_tests(TASKS["RTE"], config)["test"]
    assert (found.ids, found.examples.second) == (["5", "6"], ["b0", "b1"])
    assert read_glue_tests(TASKS["MNLI"], config) == {}


def squad_file(folder: Path, split: str, answered: bool = True) -> None:
    asked: list[dict[str, Any]] = [{"id": f"{split}é{i}", "question": "bad1?"} for i in range(2)]
    for question in asked if answered else []:
        question["answers"] = [{"text": "good1", "answer_start": 6}]
    tree = {"data": [{"title": "t", "paragraphs": [{"context": "word1 good1 word2 word3", "qas": asked}]}]}
    (folder / f"{split}-v1.1.json").write_text(json.dumps(tree), "utf-8")


def test_squad_gets_predictions_by_id(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        squad_file(tmp_path, split)
    assert opened(tmp_path, tmp_path, "SQuAD").missing == ("test",)
    squad_file(tmp_path, "test", answered=False)
    # Two tokens of paragraph in a row, so each question has two windows.
    data = opened(tmp_path, tmp_path, "SQuAD", length=7, stride=2)
    (rows,) = data.test.values()
    candidates = np.full((len(rows), 4, 20), -np.inf, np.float32)
    candidates[:, :2, 0], candidates[:, 2:] = 1, 0
    # The beginning and end of the answer: the second token of the paragraph's first window.
    candidates[:, 2:, 0] = rows.second[:, None] + 1
    candidates[1::2, :2, 0] = 0
    write_all(tmp_path, data, {"dev": candidates.reshape(4, -1), "test": candidates.reshape(4, -1)}, "m")
    for part in ("dev", "test"):
        place = tmp_path / "predictions" / part
        found = json.loads((place / "predictions.json").read_text("utf-8"))
        assert found == {f"{part}é0": "good1", f"{part}é1": "good1"} and list(found) == data.ids[part]
        assert np.load(place / "SQuAD.ids.npy").tolist() == [f"{part}é0"] * 2 + [f"{part}é1"] * 2
        assert np.array_equal(np.load(place / "SQuAD.logits.npy"), candidates)
    assert data.score({"dev": candidates.reshape(4, -1)})["exact_match"] == 1


def test_files_are_whole_or_absent_and_of_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(tmp_path, write_sst2(tmp_path / "glue", 4, 3), "SST-2")
    outputs = {"dev": numbers([1, 0], [0, 1], [1, 0])}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("distlm.finetune.predictions.save_array", full)
        with pytest.raises(DistlmError, match=r"predictions/dev: no space left on the disk"):
            write_all(tmp_path / "out", data, outputs, "m")
    assert (
        not (tmp_path / "out" / "predictions" / "dev").exists()
        and predicted_parts(tmp_path / "out", data, "m") == frozenset()
    )
    # What a kill left is swept.
    (tmp_path / "out" / "predictions" / ".dev.tmp" / "SST-2.tsv").write_text("cut", "utf-8")
    write_all(tmp_path / "out", data, outputs, "m")
    assert [path.name for path in (tmp_path / "out" / "predictions").iterdir()] == ["dev"]
    assert predicted_parts(tmp_path / "out", data, "m") == {"dev"}
    with pytest.raises(
        DistlmError, match=r"predictions/dev: predictions of another fine-tuning \(model m there, n now"
    ):
        predicted_parts(tmp_path / "out", data, "n")
    other = opened(tmp_path, write_sst2(tmp_path / "glue", 4, 2), "SST-2")
    with pytest.raises(DistlmError, match=r"another fine-tuning \(data "):
        predicted_parts(tmp_path / "out", other, "m")


def test_finetuning_writes_those_of_its_scores_for_each_seed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_sst2(tmp_path / "glue")
    model = hugging_face(tmp_path / "hf", initializer_range=0.2)
    given = (f"finetune.checkpoint={model}", "finetune.seeds=[1,2]", "finetune.epochs=1", "finetune.keep_models=true")
    run(finetune_config(tmp_path / "bare", data, *given))
    assert "has no test of SST-2: no predictions for it" in capfd.readouterr().err
    write_test(data)
    config = finetune_config(tmp_path / "run", data, *given)
    run(config)
    assert "has no test" not in capfd.readouterr().err
    labels = [line.split("\t")[1] for line in (data / "SST-2" / "dev.tsv").read_text("utf-8").splitlines()[1:]]
    for seed in ("seed-1", "seed-2"):
        folder = tmp_path / "run" / "finetune" / "SST-2" / seed
        told = (folder / "predictions" / "dev" / "SST-2.tsv").read_text("utf-8").splitlines()[1:]
        assert [line.split("\t")[0] for line in told] == [str(i) for i in range(40)]
        right = np.mean([line.split("\t")[1] == label for line, label in zip(told, labels, strict=True)])
        result = json.loads((folder / "result.json").read_text("utf-8"))
        assert right == result["last"]["accuracy"]
        test = (folder / "predictions" / "test" / "SST-2.tsv").read_text("utf-8").splitlines()
        assert [line.split("\t")[0] for line in test[1:]] == [str(100 + i) for i in range(13)]
        # The test set decides nothing that is trained.
        bare = tmp_path / "bare" / "finetune" / "SST-2" / seed
        assert json.loads((bare / "result.json").read_text("utf-8"))["epochs"] == result["epochs"]
        assert not (bare / "predictions" / "test").exists()
    one, two = (tmp_path / "run" / "finetune" / "SST-2" / f"seed-{seed}" / "predictions" for seed in (1, 2))
    assert (one / "dev" / "SST-2.logits.npy").read_bytes() != (two / "dev" / "SST-2.logits.npy").read_bytes()
    # A kill after the last checkpoint: the model is taken from there.
    before = {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    (one.parent / "result.json").unlink()
    for path in (one / "dev").iterdir():
        path.unlink()
    (one / "dev").rmdir()
    run(config)
    assert before == {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
