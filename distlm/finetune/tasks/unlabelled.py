"""Test sets of GLUE, which have no labels: their sentences, and the ids that the benchmark wants back."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distlm.data.text.stream import read_lines
from distlm.errors import DistlmError
from distlm.finetune.tasks.glue import DIAGNOSTIC, Examples, GlueTask, load_glue_hub, task_folder
from distlm.finetune.tasks.hub import hub_rows
from distlm.models.plm.config import FinetuneConfig

_IDS = ("index", "id")
"""What the column of the ids is called."""


class Unlabelled(NamedTuple):
    """One split."""

    examples: Examples
    """All with the label 0."""
    ids: list[str]
    """As the source has them; the number of the row, from 0, where it has none."""


_Row = tuple[str, str, tuple[str, ...]]
"""Where it is, id and sentences."""


def read_glue_tests(task: GlueTask, config: FinetuneConfig) -> dict[str, Unlabelled]:
    """Those of `task.tests` that are there, in the order of the source.

    Raises DistlmError naming file and line (or data set) and field for a column that is missing, a row that is cut,
    and a file without rows.
    """
    found = {}
    for split in task.tests:
        rows = _hub_test(task, config, split) if config.source == "hub" else _file_test(task, config, split)
        if rows is not None:
            found[split] = _unlabelled(task, rows)
    return found


def _unlabelled(task: GlueTask, rows: Iterator[_Row]) -> Unlabelled:
    texts: dict[str, tuple[str, ...]] = {}
    for place, name, sentences in rows:
        if name in texts:
            raise DistlmError(f"{place}: the id {name} again; predictions would be ambiguous, get the file again")
        texts[name] = sentences
    second = [sentences[1] for sentences in texts.values()] if len(task.columns) > 1 else None
    labels = np.zeros(len(texts), np.int64 if task.labels else np.float64)
    return Unlabelled(Examples([sentences[0] for sentences in texts.values()], second, labels), [*texts])


def _file_test(task: GlueTask, config: FinetuneConfig, split: str) -> Iterator[_Row] | None:
    folder = task_folder(task, config.data_dir)
    places = [folder / f"{split}.tsv"]
    if split == DIAGNOSTIC:
        # Beside the folders of the tasks, under the name of the download script or the benchmark's own.
        beside = folder.parent if folder.name == task.name else folder
        places += [beside / DIAGNOSTIC / f"{DIAGNOSTIC}.tsv", beside / "AX" / "AX.tsv"]
    path = next((place for place in places if place.is_file()), None)
    return None if path is None else _file_rows(task, path)


def _file_rows(task: GlueTask, path: Path) -> Iterator[_Row]:
    """Tab-separated without quoting, with a first line of names also where train and dev have none (CoLA)."""
    names: list[str] = []
    number = 0
    for number, line in enumerate(read_lines(path), 1):
        cells = line.removesuffix("\r").split("\t")
        if number == 1:
            names = [cells[0].removeprefix("\ufeff"), *cells[1:]]
            if missing := [name for name in task.columns if name not in names]:
                raise DistlmError(
                    f"{path}: no column {missing[0]!r} in its first line ({', '.join(names)[:200]}); the test set of "
                    f"{task.name} has {', '.join(('index', *task.columns))}: is this the file of another task? Give "
                    "the benchmark's own, or take it away"
                )
            where = [names.index(name) for name in task.columns]
            place = next((names.index(name) for name in _IDS if name in names), None)
            continue
        if len(cells) != len(names):
            raise DistlmError(
                f"{path}, line {number}: {len(cells)} columns, the first line names {len(names)} ({', '.join(names)}); "
                "the file is cut, get it again or take it away"
            )
        name = str(number - 2) if place is None else cells[place]
        yield f"{path}, line {number}", name, tuple(cells[column] for column in where)
    if number < 2:
        raise DistlmError(f"{path}: no examples; get the file again or take it away")


def _hub_test(task: GlueTask, config: FinetuneConfig, split: str) -> Iterator[_Row] | None:
    loaded, name = load_glue_hub(task, config)
    if split not in loaded:
        return None
    table, what = loaded[split], f"finetune.hub_name={name}, {split}"
    given = "idx" in table.column_names
    rows = hub_rows(table, (*task.hub_columns, *(("idx",) if given else ())), what)
    return (
        (where, str(values[-1] if given else number), tuple(values[: len(task.hub_columns)]))
        for number, (where, values) in enumerate(rows)
    )
