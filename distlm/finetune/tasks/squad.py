"""SQuAD 1.1 (Rajpurkar et al. 2016): paragraphs, questions and answers, from its JSON files or the hub."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlm.data.text.hub import load_hub
from distlm.errors import DistlmError
from distlm.finetune.tasks.hub import hub_rows, hub_split
from distlm.models.plm.config import FinetuneConfig
from distlm.runtime.files import json_of
from distlm.system_errors import refuse

SQUAD_HUB = "rajpurkar/squad"
_MISPLACED = 0.01


@dataclass(frozen=True)
class Question:
    """One question and its answers."""

    id: str
    text: str
    context: int
    """Number of its paragraph."""
    answers: tuple[str, ...]
    """None in a test set."""
    start: int
    """Where the first answer begins in the paragraph, in characters; -1: not where the file says."""

    @property
    def end(self) -> int:
        """The character behind the first answer, of one that is known."""
        return self.start + len(self.answers[0]) if self.answers else self.start


@dataclass(frozen=True)
class Squad:
    """One split."""

    contexts: list[str]
    """Paragraphs."""
    questions: list[Question]

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def misplaced(self) -> int:
        """Questions whose first answer is not where the file says: of no use in training."""
        return sum(question.start < 0 for question in self.questions)


def read_squad(config: FinetuneConfig, train: bool = True) -> dict[str, Squad]:
    """The splits "train" and "dev", questions in the order of the source; without `train`, "dev" alone.

    Raises DistlmError naming the file and field for a missing or broken file, for SQuAD 2.0 (questions without an
    answer), and when more than 1 % of the first answers of train are not where `answer_start` says.
    """
    wanted = ("train", "dev") if train else ("dev",)
    if config.source == "hub":
        name = config.hub_name or SQUAD_HUB
        loaded = load_hub("finetune", name, "")
        splits = {}
        for split in wanted:
            table, what = hub_split(loaded, name, {"dev": "validation"}.get(split, split), "SQuAD")
            splits[split] = _squad(_hub_rows(table, what), what)
    else:
        files = {split: _find(config.data_dir, split) for split in wanted}
        splits = {split: _squad(_file_rows(path), str(path)) for split, path in files.items()}
    asked = splits.get("train")
    if asked and asked.misplaced > _MISPLACED * len(asked):
        raise DistlmError(
            f"finetune.task=SQuAD: {asked.misplaced} of {len(asked)} first answers of train are not at their "
            "answer_start, which counts characters from 0; get the original file"
        )
    return splits


def read_squad_test(config: FinetuneConfig) -> Squad | None:
    """Questions of test-v1.1.json(.gz) in finetune.data_dir, which need have no answers; None where there is none.

    Raises DistlmError for a broken file.
    """
    if config.source == "hub":
        return None
    for path in _files(config.data_dir, "test"):
        if path.is_file():
            return _squad(_file_rows(path, answered=False), str(path), answered=False)
    return None


_Row = tuple[str, str, str, str, Any, Any]
"""Place, id, context, question, answer texts, answer starts."""


def _squad(rows: Iterator[_Row], what: str, answered: bool = True) -> Squad:
    places: dict[str, int] = {}
    questions = []
    for place, name, context, text, answers, starts in rows:
        number = places.setdefault(context, len(places))
        if not answered:
            questions.append(Question(name, text, number, (), -1))
            continue
        if not answers:
            raise DistlmError(
                f"{place}: question {name} has no answer; finetune.task=SQuAD is SQuAD 1.1, get train-v1.1.json and "
                "dev-v1.1.json"
            )
        right = context[starts[0] : starts[0] + len(answers[0])] == answers[0] != ""
        questions.append(Question(name, text, number, tuple(answers), starts[0] if right else -1))
    if not questions:
        raise DistlmError(f"{what}: no questions")
    return Squad(list(places), questions)


def _find(data_dir: str, split: str) -> Path:
    if not data_dir:
        raise DistlmError(
            "finetune.data_dir is empty; set it to a folder with train-v1.1.json and dev-v1.1.json, or "
            "finetune.source=hub"
        )
    for path in _files(data_dir, split):
        if path.is_file():
            return path
    raise DistlmError(f"finetune.data_dir={data_dir}: no {split}-v1.1.json or {split}-v1.1.json.gz in it (SQuAD 1.1)")


def _files(data_dir: str, split: str) -> list[Path]:
    return [Path(data_dir) / f"{split}-v1.1.json{suffix}" for suffix in ("", ".gz")]


def _file_rows(path: Path, answered: bool = True) -> Iterator[_Row]:
    try:
        raw = path.read_bytes()
        tree = json_of(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (OSError, EOFError, ValueError) as error:
        refuse(error, path)
        raise DistlmError(f"{path}: not a readable JSON file ({error}); get it again") from error
    place = str(path)
    try:
        for article in tree["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = question["answers"] if answered else []
                    texts, starts = ([answer[key] for answer in answers] for key in ("text", "answer_start"))
                    yield place, question["id"], paragraph["context"], question["question"], texts, starts
    except (KeyError, TypeError) as error:
        raise DistlmError(
            f"{path}: not SQuAD's format: {type(error).__name__} {error}; get the original file"
        ) from error


def _hub_rows(table: Any, what: str) -> Iterator[_Row]:
    for place, (name, context, text, answers) in hub_rows(table, ("id", "context", "question", "answers"), what):
        yield place, name, context, text, answers["text"], answers["answer_start"]
