"""Data sets of the `datasets` library: on the Hugging Face hub, or a local folder that it can load."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distlm.data.text.choice import TextChoice
from distlm.errors import DistlmError
from distlm.installed import install

HUB_SPLITS = {"train": ("train",), "valid": ("validation", "valid"), "test": ("test",)}
_BATCH = 1000


def hub_label(section: str, name: str, config: str) -> str:
    """A hub data set as errors name it; `section` is that of its settings."""
    return f"{section}.hub_name={name}" + (f" ({config})" if config else "")


def load_hub(section: str, name: str, config: str) -> Any:
    """Splits of a data set of the `datasets` library: one on the hub, or a local folder that it can load.

    Raises DistlmError, naming the settings of `section`, when the library or the data set is missing.
    """
    if not name:
        raise DistlmError(f"{section}.hub_name is empty; name a data set, e.g. {section}.hub_name=Salesforce/wikitext")
    try:
        import datasets
    except ImportError as error:
        raise DistlmError(f"{section}.source=hub needs the datasets library: {install('hub')} ({error})") from error
    try:
        return datasets.load_dataset(name, config or None)
    except Exception as error:  # the library's own errors, the network's and the file readers' have no common class
        what = hub_label(section, name, config)
        raise DistlmError(
            f"{what}: the datasets library cannot load it: {type(error).__name__}: {error}; check {section}.hub_name "
            f"and {section}.hub_config, or download the text and use {section}.source=folder"
        ) from error


def hub_tables(choice: TextChoice) -> Mapping[str, Any]:
    """Split that is read → table of the `datasets` library that has the column of the text only.

    Raises DistlmError, naming the settings, when the library, the data set, a split or the column is missing, a split
    is empty, or a split is there that is to be split off train.
    """
    section, column = choice.section, choice.hub_field
    loaded = load_hub(section, choice.hub_name, choice.hub_config)
    what = hub_label(section, choice.hub_name, choice.hub_config)
    for split in choice.shares:
        if found := next((name for name in HUB_SPLITS[split] if name in loaded), None):
            raise DistlmError(f"{what}: it has a {found} split; leave {section}.{split}_share out to use that")
    tables: dict[str, Any] = {}
    for split in choice.read:
        names = HUB_SPLITS[split]
        found = next((word for word in names if word in loaded), None)
        if found is None:
            mend = f"; {choice.splitting}" if split != "train" else ""
            raise DistlmError(f"{what}: no {' or '.join(names)} split; it has {', '.join(loaded)}{mend}")
        table = loaded[found]
        if column not in table.column_names:
            raise DistlmError(f"{what}: no column {section}.hub_field={column}; it has {', '.join(table.column_names)}")
        if len(table) == 0:
            raise DistlmError(f"{what}: the {found} split is empty")
        tables[split] = table.select_columns([column])
    return tables


def column_of(table: Any, column: str) -> Callable[[int, int], Iterator[Any]]:
    """Reads the values of rows [start, end)."""

    def read(start: int, end: int) -> Iterator[Any]:
        for first in range(start, end, _BATCH):
            yield from table[first : min(first + _BATCH, end)][column]

    return read
