"""A task as training sees it: rows of train, dev and test, the metrics of what a model gives for dev, a baseline, and
the predictions that the numbers of a model mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from distlm.errors import UsageError
from distlm.finetune.source import Source
from distlm.finetune.tasks.features import Frame, Rows, Windows, encode_examples, encode_squad
from distlm.finetune.tasks.glue import TASKS, Examples, GlueTask, read_glue
from distlm.finetune.tasks.metrics import glue_scores, majority_answer_scores, majority_scores, squad_scores
from distlm.finetune.tasks.spans import CANDIDATES, Candidates, decode_answers
from distlm.finetune.tasks.squad import Squad, read_squad, read_squad_test
from distlm.finetune.tasks.unlabelled import read_glue_tests
from distlm.models.plm.config import FinetuneConfig
from distlm.runtime.files import json_hash

Outputs = Mapping[str, npt.NDArray[np.float32]]
"""Split → [n, F]: the head's numbers for its rows, or the best candidates for a span."""
PARTS = ("dev", "test")
"""What there are predictions of; each may have several splits."""


class Predictions(NamedTuple):
    """Of one split."""

    name: str
    """Of its files."""
    answers: dict[str, str]
    """Id → label, number or text, in the order of the source."""
    row_ids: list[str]
    """Id of each row of `numbers`: the same, but for SQuAD, which has several rows of one question."""
    numbers: npt.NDArray[np.float32]
    """[n, …] what the model gave."""


class Predicting(Protocol):
    """Split, and what a model gave for its rows → its predictions."""

    def __call__(self, split: str, numbers: npt.NDArray[np.float32]) -> Predictions: ...


class Scoring(Protocol):
    """What a model gave for dev → metric → value."""

    def __call__(self, outputs: Outputs) -> dict[str, float]: ...


@dataclass(frozen=True)
class TaskData:
    """A task with its data."""

    name: str
    head: Literal["labels", "number", "span"]
    outputs: int
    """Numbers that the head gives."""
    labels: tuple[str, ...]
    """Names of the labels, if any."""
    train: Rows
    dev: dict[str, Rows]
    score: Scoring
    main: str
    """The task's metric."""
    baseline: dict[str, float]
    """Metric → the best that a single answer for all of dev reaches; of SQuAD, what train's most frequent one does."""
    predict: Predicting
    """For dev and test."""
    test: dict[str, Rows] = field(default_factory=dict)
    """Those that are there; all with the label 0."""
    ids: dict[str, list[str]] = field(default_factory=dict)
    """Split of dev or test → ids of its examples."""
    missing: tuple[str, ...] = ()
    """Test sets that are not there."""
    left_out: int = 0
    """Questions of train without an answer that can be found."""

    @property
    def fingerprint(self) -> str:
        """Of all rows and labels, in order."""
        return json_hash([self.train.fingerprint, {name: rows.fingerprint for name, rows in self.dev.items()}])

    def splits(self, part: str) -> dict[str, Rows]:
        """Rows of dev or test, by split."""
        return self.dev if part == "dev" else self.test

    def part_fingerprint(self, part: str) -> str:
        """Of the rows, labels and ids of dev or test."""
        return json_hash({name: [rows.fingerprint, self.ids[name]] for name, rows in self.splits(part).items()})


def open_task(config: FinetuneConfig, source: Source, train: bool = True) -> TaskData:
    """Read the data of finetune.task and turn them into rows with the source's tokenizer.

    Without `train` its rows are none, and SQuAD has no baseline. `config` has no defaults left
    (FinetuneConfig.with_defaults). Raises DistlmError for data that are missing or not the task's, and for rows that
    are longer than the model takes.
    """
    if config.length > source.max_positions:
        raise UsageError(
            f"finetune.length={config.length}: {source.name} takes rows of at most {source.max_positions} tokens; set "
            "that or less"
        )
    frame = Frame.of(source.tokenizer, source.pad)
    return _squad(config, source, frame, train) if config.task == "SQuAD" else _glue(config, source, frame, train)


def _glue(config: FinetuneConfig, source: Source, frame: Frame, train: bool) -> TaskData:
    task = TASKS[config.task]
    splits, tests = read_glue(task, config, train), read_glue_tests(task, config)

    def encode(examples: Examples, split: str) -> Rows:
        return encode_examples(source.tokenizer, frame, examples, config.length, config.truncation, split)

    rows = {name: encode(found, name) for name, found in splits.items()}
    dev = {name: splits[name] for name in task.dev}
    ids = {name: [str(number) for number in range(len(found))] for name, found in dev.items()}
    ids |= {name: found.ids for name, found in tests.items()}
    baseline: dict[str, float] = {}
    for split, examples in dev.items():
        baseline |= _named(majority_scores(task, examples), task, split)
    return TaskData(
        task.name,
        "labels" if task.labels else "number",
        max(len(task.labels), 1),
        task.labels,
        rows["train"] if train else encode(splits[task.dev[0]].none, "train"),
        {name: rows[name] for name in task.dev},
        partial(_score_glue, task, dev),
        task.metrics[0],
        baseline,
        partial(_predict_glue, task, ids),
        {name: encode(found.examples, name) for name, found in tests.items()},
        ids,
        tuple(split for split in task.tests if split not in tests),
    )


def _predict_glue(
    task: GlueTask, ids: Mapping[str, list[str]], split: str, numbers: npt.NDArray[np.float32]
) -> Predictions:
    if task.labels:
        answers = [task.labels[label] for label in numbers.argmax(1)]
    else:
        answers = [f"{number:.3f}" for number in numbers[:, 0]]
    return Predictions(task.submission(split), dict(zip(ids[split], answers, strict=True)), ids[split], numbers)


def _score_glue(task: GlueTask, dev: Mapping[str, Examples], outputs: Outputs) -> dict[str, float]:
    found: dict[str, float] = {}
    for split, examples in dev.items():
        numbers = outputs[split]
        predictions = numbers.argmax(1) if task.labels else numbers[:, 0]
        found |= _named(glue_scores(task.metrics, predictions, examples.labels), task, split)
    return found


def _named(scores: Mapping[str, float], task: GlueTask, split: str) -> dict[str, float]:
    """A second dev split's metrics have its name behind them: accuracy_mismatched."""
    suffix = "" if split == task.dev[0] else f"_{split.removeprefix('dev_')}"
    return {name + suffix: value for name, value in scores.items()}


def _squad(config: FinetuneConfig, source: Source, frame: Frame, train: bool) -> TaskData:
    splits, test = read_squad(config, train), read_squad_test(config)
    splits |= {"test": test} if test else {}
    asked = splits.get("train", Squad([], []))

    def encode(squad: Squad, for_training: bool) -> Windows:
        return encode_squad(source.tokenizer, frame, squad, config.length, config.stride, for_training)

    windows = {name: encode(splits[name], False) for name in PARTS if name in splits}
    to_train = encode(asked, True)

    def answers(split: str, numbers: npt.NDArray[np.float32]) -> dict[str, str]:
        scores, places = np.split(numbers.reshape(-1, 4, CANDIDATES), 2, axis=1)
        candidates = Candidates(scores, places.astype(np.int64))
        return decode_answers(splits[split], windows[split], candidates, config.answer_tokens)

    def score(outputs: Outputs) -> dict[str, float]:
        return squad_scores(answers("dev", outputs["dev"]), splits["dev"].questions)

    def predict(split: str, numbers: npt.NDArray[np.float32]) -> Predictions:
        rows = [splits[split].questions[number].id for number in windows[split].question]
        return Predictions("SQuAD", answers(split, numbers), rows, numbers.reshape(-1, 4, CANDIDATES))

    return TaskData(
        "SQuAD", "span", 2, (), to_train.rows, {"dev": windows["dev"].rows}, score, "f1",
        majority_answer_scores(asked.questions, splits["dev"].questions) if train else {}, predict,
        {"test": windows["test"].rows} if test else {},
        {name: [question.id for question in splits[name].questions] for name in windows},
        () if test else ("test",), len(asked) - len(np.unique(to_train.question)),
    )  # fmt: skip
