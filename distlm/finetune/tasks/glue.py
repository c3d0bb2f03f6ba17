"""The tasks of GLUE (Wang et al. 2018): which files and columns they have, what their labels are called.

Labels are numbered as the data sets on the hub number them, so that files and hub give the same examples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distlm.data.order import epoch_order
from distlm.data.text.hub import load_hub
from distlm.data.text.stream import read_lines
from distlm.errors import DistlmError
from distlm.finetune.tasks.hub import hub_rows, hub_split
from distlm.models.plm.config import FinetuneConfig

GLUE_HUB = "nyu-mll/glue"
DIAGNOSTIC = "diagnostic"


@dataclass(frozen=True)
class GlueTask:
    """One task."""

    name: str
    """Also the folder of its files."""
    columns: tuple[str, ...]
    """Columns of the sentence, or of the two sentences, in the files."""
    label: str
    """Column of the label in the files."""
    labels: tuple[str, ...]
    """What label i is called in the files; none: the label is a number (regression)."""
    hub_columns: tuple[str, ...]
    """The same columns on the hub, where the label is `label`."""
    metrics: tuple[str, ...] = ("accuracy",)
    """The first one is the task's; see metrics.py."""
    header: bool = True
    """The files begin with the columns' names."""
    fixed: tuple[str, ...] = ()
    """Columns of files without them."""
    dev: tuple[str, ...] = ("dev",)
    """Splits to score."""
    incomplete: bool = False
    """The published files have some rows that are cut short, which everybody leaves out."""

    @property
    def hub_config(self) -> str:
        """Name of its configuration on the hub."""
        return self.name.replace("-", "").lower()

    @property
    def tests(self) -> tuple[str, ...]:
        """Splits without labels; MNLI's model answers GLUE's diagnostic set, too."""
        found = tuple(split.replace("dev", "test", 1) for split in self.dev)
        return (*found, DIAGNOSTIC) if self.name == "MNLI" else found

    def submission(self, split: str) -> str:
        """What the benchmark calls the file of predictions for a split, without .tsv."""
        names = {"matched": "MNLI-m", "mismatched": "MNLI-mm", DIAGNOSTIC: "AX"}
        return names.get(split.rpartition("_")[2], self.name)


_PAIR = ("sentence1", "sentence2")
_BINARY, _ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            "CoLA", ("sentence",), "label", _BINARY, ("sentence",), ("matthews", "accuracy"), header=False,
            fixed=("source", "label", "star", "sentence"),
        ),
        GlueTask("SST-2", ("sentence",), "label", _BINARY, ("sentence",)),
        GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", _BINARY, _PAIR, ("accuracy", "f1")),
        GlueTask("STS-B", _PAIR, "score", (), _PAIR, ("pearson", "spearman")),
        GlueTask(
            "QQP", ("question1", "question2"), "is_duplicate", _BINARY, ("question1", "question2"), ("accuracy", "f1"),
            incomplete=True,
        ),
        GlueTask(
            "MNLI", _PAIR, "gold_label", ("entailment", "neutral", "contradiction"), ("premise", "hypothesis"),
            dev=("dev_matched", "dev_mismatched"),
        ),
        GlueTask("QNLI", ("question", "sentence"), "label", _ENTAILMENT, ("question", "sentence")),
        GlueTask("RTE", _PAIR, "label", _ENTAILMENT, _PAIR),
        GlueTask("WNLI", _PAIR, "label", _BINARY, _PAIR),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Examples:
    """The examples of one split."""

    first: list[str]
    second: list[str] | None
    """Second sentences, for tasks of two."""
    labels: npt.NDArray[np.generic]
    """int64 [n] numbers of labels, or fp64 [n]."""

    def __len__(self) -> int:
        return len(self.first)

    @property
    def none(self) -> "Examples":
        """No examples, of the same task."""
        return Examples([], None if self.second is None else [], self.labels[:0])


def read_glue(task: GlueTask, config: FinetuneConfig, train: bool = True) -> dict[str, Examples]:
    """Examples of train and of each split of `task.dev`, in the order of the source; without `train`, of dev alone.

    Raises DistlmError naming file and line (or data set and row) and field for a missing or empty source, a column
    that is not there, and a label that the task does not have.
    """
    wanted = ("train", *task.dev) if train else task.dev
    rows = _from_hub(task, config, wanted) if config.source == "hub" else _from_folder(task, config.data_dir, wanted)
    splits = {}
    for split, (what, found) in rows.items():
        splits[split] = _examples(task, found)
        if not len(splits[split]):
            raise DistlmError(f"{what}: no examples; finetune.task={task.name} needs some")
    if train and 0 < config.train_rows < len(splits["train"]):
        splits["train"] = _drawn(splits["train"], config.train_rows)
    return splits


def _drawn(examples: Examples, count: int) -> Examples:
    """So many of them, in their order."""
    rows = np.sort(epoch_order(0, 0, len(examples))[:count])
    second = examples.second and [examples.second[row] for row in rows]
    return Examples([examples.first[row] for row in rows], second, examples.labels[rows])


_Row = tuple[str, tuple[str, ...], Any]
"""Where it is, its sentences, and its label: a number, or text from a file."""


def _examples(task: GlueTask, rows: Iterator[_Row]) -> Examples:
    sentences: list[tuple[str, ...]] = []
    labels: list[float] = []
    for place, texts, label in rows:
        sentences.append(texts)
        labels.append(_label(task, label, place))
    first = [texts[0] for texts in sentences]
    second = [texts[1] for texts in sentences] if len(task.columns) > 1 else None
    return Examples(first, second, np.array(labels, np.int64 if task.labels else np.float64))


def _label(task: GlueTask, label: Any, place: str) -> float:
    if not task.labels:
        try:
            value = float(label)
        except (TypeError, ValueError):
            value = -1.0
        if not 0 <= value <= 5:
            raise _wrong_label(task, label, place, "a number from 0 to 5")
        return value
    if isinstance(label, str) and label in task.labels:
        return task.labels.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(task.labels):
        return label
    raise _wrong_label(task, label, place, f"one of {', '.join(task.labels)}")


def _wrong_label(task: GlueTask, label: object, place: str, expected: str) -> DistlmError:
    return DistlmError(
        f"{place}: the label is {label!r}, {task.name} has {expected}; is this the file of another task, or a test "
        "set without labels? Give the task's train and dev files"
    )


def task_folder(task: GlueTask, data_dir: str) -> Path:
    """Where a task's files are: finetune.data_dir/TASK, or finetune.data_dir itself."""
    folder = Path(data_dir) / task.name
    return folder if folder.is_dir() else Path(data_dir)


def _from_folder(task: GlueTask, data_dir: str, splits: Sequence[str]) -> dict[str, tuple[str, Iterator[_Row]]]:
    if not data_dir:
        raise DistlmError(
            "finetune.data_dir is empty; set it to the folder of the GLUE benchmark's files, or finetune.source=hub"
        )
    folder = task_folder(task, data_dir)
    paths = {split: folder / f"{split}.tsv" for split in splits}
    for split, path in paths.items():
        if not path.is_file():
            raise DistlmError(
                f"finetune.data_dir={data_dir}: no {task.name}/{split}.tsv in it; {task.name} needs "
                f"{', '.join(f'{name}.tsv' for name in paths)}"
            )
    return {split: (str(path), _file_rows(task, path)) for split, path in paths.items()}


def _file_rows(task: GlueTask, path: Path) -> Iterator[_Row]:
    """Tab-separated without quoting: a quotation mark is text."""
    names: Sequence[str] = task.fixed
    where: list[int] = []
    for number, line in enumerate(read_lines(path), 1):
        cells = line.removesuffix("\r").split("\t")
        if number == 1:
            cells[0] = cells[0].removeprefix("\ufeff")
            if task.header:
                names = cells
            where = [_place(task, path, names, name) for name in (*task.columns, task.label)]
            if task.header:
                continue
        if len(cells) <= max(where) or (not task.header and len(cells) != len(names)):
            if task.incomplete:
                continue
            raise DistlmError(
                f"{path}, line {number}: {len(cells)} columns, {task.name} has {len(names)} ({', '.join(names)}); is "
                "this the file of another task, or cut?"
            )
        *texts, label = (cells[place] for place in where)
        yield f"{path}, line {number}", tuple(texts), label


def _place(task: GlueTask, path: Path, names: Sequence[str], name: str) -> int:
    if name not in names:
        raise DistlmError(
            f"{path}: no column {name!r} in its first line ({', '.join(names)[:200]}); finetune.task={task.name} needs "
            f"{', '.join(map(repr, (*task.columns, task.label)))}: is this the file of another task, or a test set?"
        )
    return names.index(name)


_HUB_SPLITS = {
    "train": "train", "dev": "validation", "dev_matched": "validation_matched",
    "dev_mismatched": "validation_mismatched",
}  # fmt: skip


def load_glue_hub(task: GlueTask, config: FinetuneConfig) -> tuple[Any, str]:
    """The splits of a task of the `datasets` library, and the data set's name. Raises DistlmError without them."""
    name = config.hub_name or GLUE_HUB
    # A folder of one's own holds one data set; it has no configurations.
    return load_hub("finetune", name, "" if Path(name).is_dir() else task.hub_config), name


def _from_hub(task: GlueTask, config: FinetuneConfig, splits: Sequence[str]) -> dict[str, tuple[str, Iterator[_Row]]]:
    loaded, name = load_glue_hub(task, config)
    found: dict[str, tuple[str, Iterator[_Row]]] = {}
    for split in splits:
        table, what = hub_split(loaded, name, _HUB_SPLITS[split], task.name)
        rows = hub_rows(table, (*task.hub_columns, "label"), what)
        found[split] = what, ((place, values[:-1], values[-1]) for place, values in rows)
    return found
