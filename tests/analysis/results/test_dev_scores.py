"""How sure a difference between two scores on one dev set is."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.finetune import vocabulary
from support.pkm_plm import finetuned

from distlm.analysis.results.dev_scores import dev_rows, dev_terms, paired_error, score_error
from distlm.errors import DistlmError
from distlm.finetune.data import TaskData, open_task
from distlm.finetune.predictions import write_all
from distlm.finetune.records import FinetuneResults
from distlm.finetune.source import Source
from distlm.finetune.tasks.metrics import glue_scores
from distlm.models.plm.config import FinetuneConfig

ROWS = 400


def opened(folder: Path, task: str) -> TaskData:
    """The task with the tiny vocabulary."""
    tokenizer = vocabulary(folder / "tokenizer").tokenizer()
    source = Source(
        "s", None, {"model_type": "bert", "max_position_embeddings": 64}, {}, 1, 9, {}, tokenizer, "h", 0, "f"
    )
    return open_task(config_of(folder, task), source)


def config_of(folder: Path, task: str) -> FinetuneConfig:
    return FinetuneConfig(task=task, data_dir=str(folder), length=32).with_defaults()  # type: ignore[arg-type]


def logits(right: npt.NDArray[np.bool_], labels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    predicted = np.where(right, labels, 1 - labels)
    return np.eye(2, dtype=np.float32)[predicted]


def placed(root: Path, run: str, data: TaskData, numbers: npt.NDArray[np.float32], folder: Path) -> FinetuneResults:
    """A fine-tuning with one seed, its results and its predictions."""
    value = data.score({"dev": numbers})[data.main]
    place = finetuned(root, run, data.name, [value], rows=len(numbers))
    write_all(place / "seed-1", data, {"dev": numbers}, "m")
    results = FinetuneResults.read(place / "results.json")
    results.settings = config_of(folder, data.name)
    results.write(place / "results.json")
    return results


def test_predictions_and_labels_give_the_error_row_by_row(tmp_path: Path) -> None:
    """Of two models that are wrong about mostly the same rows; of an accuracy the paired t-test's."""
    random = np.random.default_rng(1)
    labels = random.integers(0, 2, ROWS)
    for task, lines in (
        ("SST-2", ["sentence\tlabel", *(f"good1\t{label}" for label in labels)]),
        ("CoLA", [f"gj04\t{label}\t\tgood1" for label in labels]),
    ):
        (tmp_path / task).mkdir()
        for split in ("train", "dev"):
            (tmp_path / task / f"{split}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
        data = opened(tmp_path, task)
        hard = random.random(ROWS) < 0.3
        sides = [logits(~hard ^ (random.random(ROWS) < 0.05), labels) for _ in range(2)]
        results = [placed(tmp_path / "runs", run, data, side, tmp_path) for run, side in zip("ab", sides, strict=True)]
        places = [tmp_path / "runs" / run / "finetune" / task for run in "ab"]
        terms = [dev_terms(place, found, "1") for place, found in zip(places, results, strict=True)]
        assert terms[0] is not None and terms[1] is not None and dev_rows(results[0]) == ROWS
        error = paired_error(terms[:1], terms[1:])  # type: ignore[arg-type]
        predicted = [side.argmax(1) for side in sides]
        if task == "SST-2":
            apart = (predicted[0] == labels).astype(float) - (predicted[1] == labels)
            assert error == pytest.approx(apart.std(ddof=1) / math.sqrt(ROWS), rel=1e-9)
            value = results[0].median["accuracy"]
        else:
            assert error == pytest.approx(bootstrap(predicted, labels), rel=0.15)
            value = results[0].median["matthews"]
        # What is alike for both tells nothing of their difference.
        assert error < 0.6 * math.sqrt(2) * score_error(results[0].metric, value, ROWS)
        # Five equal models are as sure as one.
        assert paired_error(terms[:1] * 5, terms[1:] * 5) == pytest.approx(error)  # type: ignore[arg-type]


def bootstrap(predicted: list[npt.NDArray[Any]], labels: npt.NDArray[Any]) -> float:
    """Deviation of the difference of Matthews' coefficients over samples of the rows."""
    random = np.random.default_rng(2)
    found = []
    for _ in range(300):
        rows = random.integers(0, len(labels), len(labels))
        own, other = (glue_scores(["matthews"], side[rows], labels[rows])["matthews"] for side in predicted)
        found.append(own - other)
    return float(np.std(found, ddof=1))


def test_without_what_it_takes_there_are_no_rows(tmp_path: Path) -> None:
    labels = np.array([0, 1] * 10)
    (tmp_path / "SST-2").mkdir()
    text = "\n".join(["sentence\tlabel", *(f"good1\t{label}" for label in labels)]) + "\n"
    for split in ("train", "dev"):
        (tmp_path / "SST-2" / f"{split}.tsv").write_text(text, "utf-8")
    data = opened(tmp_path, "SST-2")
    results = placed(tmp_path / "runs", "a", data, logits(np.arange(20) > 2, labels), tmp_path)
    place = tmp_path / "runs" / "a" / "finetune" / "SST-2"
    assert dev_terms(place, results, "1") is not None
    # Of a seed that has none, labels of other rows, and no labels.
    results.seeds["2"] = results.seeds["1"]
    assert dev_terms(place, results, "2") is None
    (tmp_path / "SST-2" / "dev.tsv").write_text(text.replace("\t0", "\t2").replace("\t1", "\t0").replace("\t2", "\t1"))
    assert dev_terms(place, results, "1") is None
    (tmp_path / "SST-2" / "dev.tsv").unlink()
    assert dev_terms(place, results, "1") is None
    (tmp_path / "SST-2" / "dev.tsv").write_text(text, "utf-8")
    path = place / "seed-1" / "predictions" / "dev" / "SST-2.logits.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DistlmError, match=r"SST-2\.logits\.npy: damaged .*; remove the folder"):
        dev_terms(place, results, "1")


def test_the_error_of_a_score_alone() -> None:
    assert score_error("accuracy", 0.731, 872) == pytest.approx(0.0150, abs=1e-4)
    assert score_error("matthews", 0.164, 1043) == pytest.approx(0.0310, abs=1e-4)
