"""A task as training sees it: rows of train and dev, the metrics of what a model gives for dev, a baseline."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from distlm.errors import UsageError
from distlm.finetune.source import Source
from distlm.finetune.tasks.features import Frame, Rows, encode_examples, encode_squad
from distlm.finetune.tasks.glue import TASKS, Examples, GlueTask, read_glue
from distlm.finetune.tasks.metrics import glue_scores, majority_answer_scores, majority_scores, squad_scores
from distlm.finetune.tasks.spans import CANDIDATES, Candidates, decode_answers
from distlm.finetune.tasks.squad import read_squad
from distlm.models.plm.config import FinetuneConfig
from distlm.runtime.files import json_hash

Outputs = Mapping[str, npt.NDArray[np.float32]]
"""Dev split → [n, F]: the head's numbers for its rows, or the best candidates for a span."""


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
    left_out: int = 0
    """Questions of train without an answer that can be found."""

    @property
    def fingerprint(self) -> str:
        """Of all rows and labels, in order."""
        return json_hash([self.train.fingerprint, {name: rows.fingerprint for name, rows in self.dev.items()}])


def open_task(config: FinetuneConfig, source: Source) -> TaskData:
    """Read the data of finetune.task and turn them into rows with the source's tokenizer.

    `config` has no defaults left (FinetuneConfig.with_defaults). Raises DistlmError for data that are missing or not
    the task's, and for rows that are longer than the model takes.
    """
    if config.length > source.max_positions:
        raise UsageError(
            f"finetune.length={config.length}: {source.name} takes rows of at most {source.max_positions} tokens; set "
            "that or less"
        )
    frame = Frame.of(source.tokenizer, source.pad)
    return _squad(config, source, frame) if config.task == "SQuAD" else _glue(config, source, frame)


def _glue(config: FinetuneConfig, source: Source, frame: Frame) -> TaskData:
    task = TASKS[config.task]
    splits = read_glue(task, config)
    rows = {name: encode_examples(source.tokenizer, frame, found, config.length) for name, found in splits.items()}
    train, dev = rows.pop("train"), splits.copy()
    del dev["train"]
    baseline: dict[str, float] = {}
    for split, examples in dev.items():
        baseline |= _named(majority_scores(task, examples), task, split)
    return TaskData(
        task.name,
        "labels" if task.labels else "number",
        max(len(task.labels), 1),
        task.labels,
        train,
        rows,
        partial(_score_glue, task, dev),
        task.metrics[0],
        baseline,
    )


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


def _squad(config: FinetuneConfig, source: Source, frame: Frame) -> TaskData:
    splits = read_squad(config)
    train, dev = (
        encode_squad(source.tokenizer, frame, splits[name], config.length, config.stride, name == "train")
        for name in ("train", "dev")
    )

    def score(outputs: Outputs) -> dict[str, float]:
        scores, places = np.split(outputs["dev"].reshape(-1, 4, CANDIDATES), 2, axis=1)
        candidates = Candidates(scores, places.astype(np.int64))
        return squad_scores(
            decode_answers(splits["dev"], dev, candidates, config.answer_tokens), splits["dev"].questions
        )

    return TaskData(
        "SQuAD", "span", 2, (), train.rows, {"dev": dev.rows}, score, "f1",
        majority_answer_scores(splits["train"].questions, splits["dev"].questions),
        len(splits["train"]) - len(np.unique(train.question)),
    )  # fmt: skip
