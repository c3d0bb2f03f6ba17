"""Splits and rows of data sets of the `datasets` library."""

from collections.abc import Iterator, Sequence
from typing import Any

from distlm.errors import DistlmError


def hub_split(loaded: Any, name: str, split: str, task: str) -> tuple[Any, str]:
    """The table of a split, and what errors call it. Raises DistlmError when there is none."""
    what = f"finetune.hub_name={name}, {split}"
    if split not in loaded:
        raise DistlmError(f"{what}: no such split for finetune.task={task}; it has {', '.join(loaded)}")
    return loaded[split], what


def hub_rows(table: Any, columns: Sequence[str], what: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(place, values of the columns) of each row. Raises DistlmError for a column that is missing."""
    for column in columns:
        if column not in table.column_names:
            raise DistlmError(f"{what}: no column {column}; it has {', '.join(table.column_names)}")
    number = 0
    for batch in table.select_columns(list(columns)).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            number += 1
            yield f"{what}, row {number}", values
